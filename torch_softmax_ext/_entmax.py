"""Entmax: functions and modules."""

import torch
from torch import Tensor, nn

from torch_softmax_ext._options import described
from torch_softmax_ext._row_map import RowMapModule, documented_map, row_map


@documented_map
def entmax15(
    input: Tensor,
    dim: int = -1,
    *,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    r"""Entmax with alpha 1.5: between softmax and sparsemax, with exact zeros and a smooth corner.

    .. math:: p_i = \max(s_i / 2 - \tau, 0)^2, \quad \tau \text{ such that } \sum_i p_i = 1,
        \quad s = x / \text{temperature} + \text{mask}

    A replacement for :func:`torch.softmax`. The threshold is found without sorting, to the rounding of the sum. Peters,
    Niculae & Martins, "Sparse Sequence-to-Sequence Models" (ACL 2019).

    Args:
        {arguments}

    Returns:
        {probabilities}

    Raises:
        {errors}
    """
    return _entmax15(input, dim, temperature, mask, dtype)


@documented_map
def entmax(
    input: Tensor,
    alpha: float | Tensor = 1.5,
    dim: int = -1,
    *,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    r"""Entmax of any alpha: 1 is softmax, 1.5 :func:`entmax15`, 2 sparsemax. Above 1 there are exact zeros, the more
    the larger alpha is.

    .. math:: p_i = \max((\alpha - 1) s_i - \tau, 0)^{1/(\alpha - 1)}, \quad \tau \text{ such that } \sum_i p_i = 1,
        \quad s = x / \text{temperature} + \text{mask}

    Peters, Niculae & Martins, "Sparse Sequence-to-Sequence Models" (ACL 2019); with a gradient of alpha, Correia,
    Niculae & Martins, "Adaptively Sparse Transformers" (EMNLP 2019).

    Args:
        alpha: a positive number, or one for each row: a tensor that broadcasts to ``input`` and has size 1 along
            ``dim``, with gradient; its values are not checked. Below 1 only logits of -inf have
            a probability of 0. Above 2 the curve is
            vertical where a probability ends, and rows are computed in float64.
        {arguments}

    Returns:
        {probabilities}

    Raises:
        {errors}
        ValueError: ``alpha`` is a number that is not positive.
    """
    return _entmax(input, dim, temperature, mask, dtype, alpha)


_entmax15 = row_map(entmax15)
_entmax = row_map(entmax)


class Entmax15(RowMapModule, function=entmax15):
    """:func:`entmax15` as a module, like :class:`torch.nn.Softmax`."""


class Entmax(RowMapModule):
    """:func:`entmax` as a module, like :class:`torch.nn.Softmax`.

    With ``learnable``, alpha is a parameter of the shape of ``alpha``, kept between 1 and 2 by a sigmoid: one for each
    of 8 heads in (batch, heads, queries, keys) is ``Entmax(torch.full((8, 1, 1), 1.5), learnable=True)``.

    Args:
        alpha: of the function; where ``learnable``, the initial value, between 1 and 2.
        learnable: whether alpha is a parameter.

    The other arguments are those of :func:`entmax`.
    """

    def __init__(
        self,
        alpha: float | Tensor = 1.5,
        dim: int = -1,
        *,
        learnable: bool = False,
        temperature: float | Tensor = 1.0,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dim, self.learnable, self.dtype = dim, learnable, dtype
        self._set_option("temperature", temperature)
        if learnable:
            self.alpha_logit = nn.Parameter(self._logit_of(alpha))
        else:
            self._set_option("alpha", alpha)

    @staticmethod
    def _logit_of(alpha: float | Tensor) -> Tensor:
        start = torch.as_tensor(alpha, dtype=None if torch.is_tensor(alpha) else torch.get_default_dtype()).detach()
        if not ((start > 1) & (start < 2)).all():
            raise ValueError(f"Entmax: alpha: expected values between 1 and 2 where it is learnable, got {alpha}")
        return torch.logit(start - 1)

    def __getattr__(self, name):
        if name == "alpha" and self.learnable:
            return 1 + torch.sigmoid(self.alpha_logit)
        return super().__getattr__(name)

    def __setattr__(self, name, value) -> None:
        if name == "alpha" and self.learnable:  # the parameter stays, with another value
            with torch.no_grad():
                self.alpha_logit.copy_(self._logit_of(value))
            return
        super().__setattr__(name, value)

    def forward(self, input: Tensor, mask: Tensor | None = None) -> Tensor:
        return entmax(input, self.alpha, self.dim, temperature=self.temperature, mask=mask, dtype=self.dtype)

    def extra_repr(self) -> str:
        names = ("alpha", "dim", "learnable", "temperature", "dtype")
        return described((name, getattr(self, name)) for name in names)
