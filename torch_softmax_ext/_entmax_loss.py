"""Losses of sparsemax and entmax: functions, modules, and the rule of torch.func.vmap."""

import torch
from torch import Tensor
from torch.compiler import is_compiling, is_dynamo_compiling

from torch_softmax_ext import _C, _dtensor
from torch_softmax_ext._options import FunctionModule, checked, documented
from torch_softmax_ext._row_map import number_and_tensor
from torch_softmax_ext._vmap import batch_as_rows

# What the docstrings have in common.
_ARGUMENTS = """input: logits of shape ``(C)``, ``(N, C)`` or ``(N, C, d1, …, dk)``; float32, float64, float16 or
            bfloat16; any strides. Half types are computed in float32.
        target: class indices of shape ``()``, ``(N)`` or ``(N, d1, …, dk)``; int64, int32 or uint8; each in ``[0, C)``
            or ``ignore_index``. Or distributions over the classes, which sum to 1: floating point, of ``input``'s
            shape, differentiable."""
_OPTIONS = """ignore_index: a row with this target has loss 0 and gradient 0 and is not counted. Not with distributions.
        reduction: ``"none"``, ``"sum"`` or ``"mean"``. The mean divides by the number of counted targets and is NaN if
            there is none."""
_RESULT = """The loss in float32 (float64 for float64 logits): a scalar, or for ``"none"`` one number per row, in the
        shape of class indices. Never negative, and 0 where the target's probability is 1."""
_ERRORS = """IndexError: a target is neither a class nor ``ignore_index``.
        ValueError: batch sizes differ, or ``reduction`` is unknown.
        RuntimeError: other shapes do not fit; ``target`` has an unsupported dtype; tensors are on different devices;
            ``ignore_index`` is not negative with distributions.
        NotImplementedError: ``input`` is not floating point.
        TypeError: an argument has another type."""


_documented = documented(arguments=_ARGUMENTS, options=_OPTIONS, result=_RESULT, errors=_ERRORS)


def _loss(function):
    """The body of a public loss. Also registers the rules of torch.func.vmap and of DTensor."""
    _dtensor.ENTMAX_LOSSES.append(function.__name__)
    op = getattr(torch.ops.torch_softmax_ext, function.__name__).default
    short_way = getattr(_C, function.__name__)  # plain tensors only, else NotImplemented

    def arguments(input, target, ignore_index, reduction, *alpha):
        """In the order of the schema, which has a number and a tensor for alpha."""
        return (input, target, ignore_index, reduction, *(number_and_tensor(*alpha) if alpha else ()))

    def call(input, target, ignore_index, reduction, *alpha):
        if not is_dynamo_compiling():
            result = short_way(*arguments(input, target, ignore_index, reduction, *alpha))
            if result is not NotImplemented:
                return result
        if not is_compiling():
            input, target, *alpha, ignore_index, reduction = checked(
                function, (input, target, *alpha, ignore_index, reduction)
            )
        if reduction == "mean" and _dtensor.is_sharded(input):
            options = {"ignore_index": ignore_index, "reduction": reduction}
            return _dtensor.mean(
                lambda ignore_index, reduction: op(*arguments(input, target, ignore_index, reduction, *alpha)),
                (),
                options,
                target,
                class_dim=min(1, input.dim() - 1),
            )
        return op(*arguments(input, target, ignore_index, reduction, *alpha))

    def alpha_of_rows(a, batch_dim, rank, x, size):
        """A tensor of alphas for the rows of a batch, whose elements have ``rank`` dimensions."""
        a = a.unsqueeze(0) if batch_dim is None else a.movedim(batch_dim, 0)
        a = a.reshape(a.shape[0], *[1] * (rank - a.dim() + 1), *a.shape[1:])
        a = a.unsqueeze(1) if rank == 1 else a
        return a.expand(size, x.shape[0] // size, 1, *x.shape[2:]).flatten(0, 1)

    @torch.library.register_vmap(op)
    def vmap(info, in_dims, input, target, ignore_index=-100, reduction="mean", *alpha):
        """One call for the whole batch: its elements become rows, whose losses are then reduced element by element."""
        in_dims = (*in_dims, *[None] * (6 - len(in_dims)))  # those of defaults are missing
        x, t, shape = batch_as_rows(info, in_dims, input, target)
        number, row_alpha = alpha if len(alpha) == 2 else (*alpha, None) if alpha else (None, None)
        if row_alpha is not None:
            row_alpha = alpha_of_rows(row_alpha, in_dims[5], input.dim() - (in_dims[0] is not None), x, info.batch_size)
        loss = op(x, t, ignore_index, "none", *(() if number is None else (number, row_alpha)))
        if reduction == "none":
            return loss.reshape(shape), 0
        sums = loss.reshape(info.batch_size, -1).sum(1)
        if reduction == "sum":
            return sums, 0
        counted = torch.ones_like(loss, dtype=torch.bool) if t.is_floating_point() else t != ignore_index
        return sums / counted.reshape(info.batch_size, -1).sum(1), 0

    return call


@_documented
def sparsemax_loss(input: Tensor, target: Tensor, *, ignore_index: int = -100, reduction: str = "mean") -> Tensor:
    r"""The loss of :func:`~torch_softmax_ext.sparsemax`, whose gradient is its probabilities less the target's. It is
    exactly 0 where the target's logit is larger than all others by 1.

    .. math:: \ell_i = \frac{1}{2} \sum_{c \in S} (x_{ic}^2 - \tau_i^2) + \frac{1}{2} - x_{iy_i}

    with the support :math:`S` of the probabilities and their threshold :math:`\tau_i`; as a Fenchel-Young loss,
    :math:`\Omega^*(x) + \Omega(y) - \langle x, y \rangle` with :math:`\Omega(p) = (\|p\|^2 - 1) / 2`. Martins &
    Astudillo, "From Softmax to Sparsemax" (ICML 2016); Blondel, Martins & Niculae, "Learning with Fenchel-Young Losses"
    (JMLR 2020).

    Args:
        {arguments}
        {options}

    Returns:
        {result}

    Raises:
        {errors}
    """
    return _sparsemax_loss(input, target, ignore_index, reduction)


@_documented
def entmax15_loss(input: Tensor, target: Tensor, *, ignore_index: int = -100, reduction: str = "mean") -> Tensor:
    r"""The loss of :func:`~torch_softmax_ext.entmax15`, whose gradient is its probabilities less the target's. It is
    exactly 0 where the target's logit is larger than all others by 2.

    .. math:: \ell_i = \langle p - y, x \rangle + H(p) - H(y), \quad
        H(p) = \frac{4}{3} \Big(1 - \sum_c p_c^{3/2}\Big)

    Peters, Niculae & Martins, "Sparse Sequence-to-Sequence Models" (ACL 2019); Blondel, Martins & Niculae, "Learning
    with Fenchel-Young Losses" (JMLR 2020).

    Args:
        {arguments}
        {options}

    Returns:
        {result}

    Raises:
        {errors}
    """
    return _entmax15_loss(input, target, ignore_index, reduction)


@_documented
def entmax_loss(
    input: Tensor,
    target: Tensor,
    alpha: float | Tensor = 1.5,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    r"""The loss of :func:`~torch_softmax_ext.entmax`, whose gradient is its probabilities less the target's. With
    alpha 1 and class indices it is cross-entropy; above 1 it is exactly 0 from a margin of :math:`1 / (\alpha - 1)` on.

    .. math:: \ell_i = \langle p - y, x \rangle + H(p) - H(y), \quad
        H(p) = \frac{1 - \sum_c p_c^\alpha}{\alpha (\alpha - 1)}

    Blondel, Martins & Niculae, "Learning with Fenchel-Young Losses" (JMLR 2020).

    Args:
        {arguments}
        alpha: a positive number, or one for each row: a tensor that broadcasts to ``input`` and has size 1 in the
            dimension of the classes, with gradient, which comes from torch's own operators; its values are not checked.
        {options}

    Returns:
        {result}

    Raises:
        {errors}
        ValueError: ``alpha`` is a number that is not positive.
    """
    return _entmax_loss(input, target, ignore_index, reduction, alpha)


_sparsemax_loss = _loss(sparsemax_loss)
_entmax15_loss = _loss(entmax15_loss)
_entmax_loss = _loss(entmax_loss)


class _Loss(FunctionModule):
    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return self._function(input, target, **self._arguments())


class SparsemaxLoss(_Loss, function=sparsemax_loss):
    """:func:`sparsemax_loss` as a module, like :class:`torch.nn.CrossEntropyLoss`."""


class Entmax15Loss(_Loss, function=entmax15_loss):
    """:func:`entmax15_loss` as a module, like :class:`torch.nn.CrossEntropyLoss`."""


class EntmaxLoss(_Loss, function=entmax_loss):
    """:func:`entmax_loss` as a module, like :class:`torch.nn.CrossEntropyLoss`."""
