"""Benchmarks as commands: ``python -m fg_inductor bench <name>``."""
