"""Sparsemax: function and module."""

from torch import Tensor

from torch_softmax_ext._row_map import RowMapModule, row_map


def sparsemax(input: Tensor, dim: int = -1) -> Tensor:
    r"""Sparsemax: the Euclidean projection of each row onto the probability simplex. Most results are exact zeros.

    .. math:: p_i = \max(x_i - \tau, 0), \quad \tau \text{ such that } \sum_i p_i = 1

    A replacement for :func:`torch.softmax`, with the same arguments. The threshold :math:`\tau` is exact and is found
    without sorting. Martins & Astudillo, "From Softmax to Sparsemax" (ICML 2016).

    Args:
        input: logits of any shape and strides; float32, float64, float16 or bfloat16. Half types are computed in
            float32.
        dim: the dimension along which the result sums to 1.

    Returns:
        Probabilities of ``input``'s shape and dtype. A logit of ``-inf`` gets 0. A row of ``-inf`` alone gives zeros
        and a zero gradient. A NaN or ``+inf`` makes its own row NaN.

    Raises:
        IndexError: ``dim`` is out of range.
        NotImplementedError: ``input`` is not floating point.
        TypeError: an argument has another type.
    """
    return _sparsemax(input, dim)


_sparsemax = row_map(sparsemax)


class Sparsemax(RowMapModule, function=sparsemax):
    """:func:`sparsemax` as a module, like :class:`torch.nn.Softmax`."""
