"""The plain twins: the same functions by the plainest way, for tests and for timings."""
