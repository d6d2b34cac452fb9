"""Comparisons. Each has a notebook of its own and writes into the folders of its own run."""
