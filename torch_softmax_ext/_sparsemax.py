"""Sparse maps from logits to probabilities: functions, modules, and the rules of torch.func.vmap."""

import torch
from torch import Tensor, nn

from torch_softmax_ext import _C
from torch_softmax_ext._check import check_types, numbers

_sparsemax = torch.ops.torch_softmax_ext.sparsemax.default
_fast = _C.sparsemax  # plain tensors only, else NotImplemented


def sparsemax(input: Tensor, dim: int = -1) -> Tensor:
    r"""Sparsemax: the Euclidean projection of logits onto the probability simplex. Most results are exact zeros.

    .. math:: p_i = \max(x_i - \tau, 0), \quad \tau \text{ such that } \sum_i p_i = 1

    The threshold is the exact one and is found without sorting. Martins & Astudillo, "From Softmax to Sparsemax"
    (ICML 2016). A replacement for :func:`torch.softmax` with the same arguments.

    Args:
        input: logits; float32, float64, float16 or bfloat16; any shape and strides. Half types are computed in float32.
        dim: the dimension along which the result sums to 1.

    Returns:
        Probabilities of ``input``'s shape and dtype. ``-inf`` gets 0; a row of ``-inf`` alone is all zeros, with zero
        gradient; a NaN or ``+inf`` makes its own row NaN.

    Raises:
        IndexError: ``dim`` out of range.
        NotImplementedError: logits that are not floating point.
        TypeError: an argument of another type.
    """
    if not torch.compiler.is_compiling():
        result = _fast(input, dim)
        if result is not NotImplemented:
            return result
        check_types("sparsemax", input=(input, Tensor))
        (dim,) = numbers("sparsemax", dim=(dim, int))
    return _sparsemax(input, dim)


class Sparsemax(nn.Module):
    """:func:`sparsemax` as a module, as :class:`torch.nn.Softmax`."""

    def __init__(self, dim: int = -1) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, input: Tensor) -> Tensor:
        return sparsemax(input, self.dim)

    def extra_repr(self) -> str:
        return f"dim={self.dim}"


@torch.library.register_vmap("torch_softmax_ext::sparsemax")
def _vmap(info, in_dims, input, dim=-1):
    """A batch is one more dimension of rows; a batch of scalars is a row of one element each."""
    x = input.movedim(in_dims[0], 0)
    if x.dim() == 1:
        return _sparsemax(x.unsqueeze(1), 1).squeeze(1), 0
    return _sparsemax(x, dim + 1 if dim >= 0 else dim), 0
