"""Benchmarks of data-parallel training."""
