"""Comparison studies of notebooks 07 to 09. A study writes into the folders of its own run."""
