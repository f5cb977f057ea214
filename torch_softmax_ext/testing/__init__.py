"""One OpSpec per operator: all that tests and benchmarks need to know about it.

A new operator adds a file here and its spec to ``SPECS``; it then has every test of ``tests/test_all_ops.py`` and a row
in every benchmark.
"""

from torch_softmax_ext.testing.cross_entropy import SPEC as CROSS_ENTROPY
from torch_softmax_ext.testing.linear_cross_entropy import SPEC as LINEAR_CROSS_ENTROPY
from torch_softmax_ext.testing.selective_log_softmax import SPEC as SELECTIVE_LOG_SOFTMAX
from torch_softmax_ext.testing.sparsemax import SPEC as SPARSEMAX
from torch_softmax_ext.testing.spec import BenchShape, ErrorCase, OpSpec, Peer, Sample

SPECS = (CROSS_ENTROPY, LINEAR_CROSS_ENTROPY, SELECTIVE_LOG_SOFTMAX, SPARSEMAX)

__all__ = ["SPECS", "BenchShape", "ErrorCase", "OpSpec", "Peer", "Sample"]
