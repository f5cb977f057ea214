"""Sparsemax: function and module."""

import torch
from torch import Tensor

from torch_softmax_ext._row_map import RowMapModule, documented_map, row_map


@documented_map
def sparsemax(
    input: Tensor,
    dim: int = -1,
    *,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    r"""Sparsemax: the Euclidean projection of each row onto the probability simplex. Results far from the
    largest are exact zeros.

    .. math:: p_i = \max(s_i - \tau, 0), \quad \tau \text{ such that } \sum_i p_i = 1,
        \quad s = x / \text{temperature} + \text{mask}

    A replacement for :func:`torch.softmax`. The threshold :math:`\tau` is exact and is found without sorting. Martins
    & Astudillo, "From Softmax to Sparsemax" (ICML 2016).

    Args:
        {arguments}

    Returns:
        {probabilities}

    Raises:
        {errors}
    """
    return _sparsemax(input, dim, temperature, mask, dtype)


_sparsemax = row_map(sparsemax)


class Sparsemax(RowMapModule, function=sparsemax):
    """:func:`sparsemax` as a module, like :class:`torch.nn.Softmax`."""
