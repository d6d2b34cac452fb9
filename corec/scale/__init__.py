"""What goes beyond one process: an estimate of a run's needs, and training on several devices."""
