"""Timings, side by side in one run: ``python -m corec.bench data``, or ``sasrec``, ``engine``, ``large``."""
