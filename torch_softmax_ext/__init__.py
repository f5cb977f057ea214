"""Fused softmax cross-entropy and sparsemax for PyTorch, on CPU and CUDA, forward and backward."""

from torch_softmax_ext import _load  # noqa: F401  (first: registers torch.ops.torch_softmax_ext)
from torch_softmax_ext.cross_entropy import CrossEntropyLoss, cross_entropy
from torch_softmax_ext.entmax import Sparsemax, sparsemax

__all__ = ["CrossEntropyLoss", "Sparsemax", "cross_entropy", "sparsemax"]
__version__ = "0.1.0"
