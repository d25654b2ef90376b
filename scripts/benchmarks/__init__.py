"""Benchmarks against other libraries and programs."""
