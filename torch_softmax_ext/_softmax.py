"""Softmax: function and module."""

from torch import Tensor

from torch_softmax_ext._row_map import RowMapModule, row_map


def softmax(input: Tensor, dim: int = -1) -> Tensor:
    r"""Softmax that gives zeros, not NaN, where a whole row is masked.

    .. math:: p_i = \frac{\exp x_i}{\sum_j \exp x_j}

    A replacement for :func:`torch.softmax`. On CUDA it is computed by torch's operators.

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
    return _softmax(input, dim)


_softmax = row_map(softmax)


class Softmax(RowMapModule, function=softmax):
    """:func:`softmax` as a module, like :class:`torch.nn.Softmax`."""
