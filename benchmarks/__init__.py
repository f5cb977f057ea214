"""One driver over the operators' specs: ``python -m benchmarks --help``."""
