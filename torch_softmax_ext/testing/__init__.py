"""One OpSpec per operator: all that tests and benchmarks need to know about it.

A new operator adds a file with its ``SPEC`` here. It then has every test of ``tests/test_all_ops.py`` and a row in each
benchmark.
"""

import importlib
import pkgutil

from torch_softmax_ext.testing.spec import BenchShape, ErrorCase, OpSpec, Peer, Sample

_files = (importlib.import_module(f"{__name__}.{m.name}") for m in pkgutil.iter_modules(__path__))
SPECS = tuple(sorted((f.SPEC for f in _files if hasattr(f, "SPEC")), key=lambda spec: spec.name))

__all__ = ["SPECS", "BenchShape", "ErrorCase", "OpSpec", "Peer", "Sample"]
