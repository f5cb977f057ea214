"""Softmax, its losses and its sparse relatives for PyTorch, fused: CPU and CUDA, forward and backward."""

from torch_softmax_ext import _load

_C = _load.load()  # first: registers torch.ops.torch_softmax_ext

from torch_softmax_ext import _dtensor, _flops  # noqa: E402, F401  (rules for torch's own tools)
from torch_softmax_ext._cross_entropy import (  # noqa: E402
    CrossEntropyLoss,
    CrossEntropyMetrics,
    cross_entropy,
    cross_entropy_with_metrics,
)
from torch_softmax_ext._entmax import Entmax, Entmax15, entmax, entmax15  # noqa: E402
from torch_softmax_ext._entmax_loss import (  # noqa: E402
    Entmax15Loss,
    EntmaxLoss,
    SparsemaxLoss,
    entmax15_loss,
    entmax_loss,
    sparsemax_loss,
)
from torch_softmax_ext._linear_cross_entropy import LinearCrossEntropyLoss, linear_cross_entropy  # noqa: E402
from torch_softmax_ext._selective_log_softmax import selective_log_softmax  # noqa: E402
from torch_softmax_ext._softmax import LogSoftmax, Softmax, log_softmax, softmax  # noqa: E402
from torch_softmax_ext._sparsemax import Sparsemax, sparsemax  # noqa: E402

_dtensor.register()  # once every row map is known

__all__ = [
    "CrossEntropyLoss",
    "CrossEntropyMetrics",
    "Entmax",
    "Entmax15",
    "Entmax15Loss",
    "EntmaxLoss",
    "LinearCrossEntropyLoss",
    "LogSoftmax",
    "Softmax",
    "Sparsemax",
    "SparsemaxLoss",
    "cross_entropy",
    "cross_entropy_with_metrics",
    "entmax",
    "entmax15",
    "entmax15_loss",
    "entmax_loss",
    "linear_cross_entropy",
    "log_softmax",
    "selective_log_softmax",
    "softmax",
    "sparsemax",
    "sparsemax_loss",
]
__version__ = "0.1.0"
