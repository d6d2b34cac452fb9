"""Large runs: estimate of memory and time, and training on several devices."""
