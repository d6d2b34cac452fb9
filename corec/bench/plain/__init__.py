"""Reference implementations: the same functions without optimisations, for tests and timings."""
