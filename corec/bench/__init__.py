"""Benchmarks with their baselines: ``python -m corec.bench`` with ``data``, ``sasrec``, ``engine`` or ``large``."""
