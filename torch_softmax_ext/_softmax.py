"""Softmax and log-softmax: functions and modules."""

import torch
from torch import Tensor

from torch_softmax_ext._row_map import RowMapModule, documented_map, row_map


@documented_map
def softmax(
    input: Tensor,
    dim: int = -1,
    *,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    r"""Softmax with temperature and mask, which gives zeros, not NaN, where a whole row is masked.

    .. math:: p_i = \frac{\exp s_i}{\sum_j \exp s_j}, \quad s = x / \text{temperature} + \text{mask}

    A replacement for :func:`torch.softmax`.

    Args:
        {arguments}

    Returns:
        {probabilities}

    Raises:
        {errors}
    """
    return _softmax(input, dim, temperature, mask, dtype)


@documented_map
def log_softmax(
    input: Tensor,
    dim: int = -1,
    *,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    r"""The logarithm of :func:`softmax`, computed without its rounding.

    .. math:: \log p_i = s_i - \log \sum_j \exp s_j, \quad s = x / \text{temperature} + \text{mask}

    A replacement for :func:`torch.log_softmax`.

    Args:
        {arguments}

    Returns:
        Log-probabilities of ``input``'s shape. A logit of ``-inf`` keeps ``-inf``, with a zero gradient. A row of
        ``-inf`` alone stays one. A NaN or ``+inf`` that is not masked makes its own row NaN.

    Raises:
        {errors}
    """
    return _log_softmax(input, dim, temperature, mask, dtype)


_softmax = row_map(softmax)
_log_softmax = row_map(log_softmax)


class Softmax(RowMapModule, function=softmax):
    """:func:`softmax` as a module, like :class:`torch.nn.Softmax`."""


class LogSoftmax(RowMapModule, function=log_softmax):
    """:func:`log_softmax` as a module, like :class:`torch.nn.LogSoftmax`."""
