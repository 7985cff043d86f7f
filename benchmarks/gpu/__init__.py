"""Measure Charter on one GPU (python -m benchmarks.gpu)."""
