"""Benchmarks: inference and training, beside peers, in one run."""
