"""What `trainers.benchmark` is made of: models and requests, one timed run, floating-point work, memory, tables."""
