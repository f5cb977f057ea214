"""Measures every operator over its spec: ``python -m benchmarks --help``."""
