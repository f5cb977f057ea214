"""Softmax cross-entropy with class indices: function, module, and the rule of torch.func.vmap."""

import torch
from torch import Tensor, nn

from torch_softmax_ext import _C
from torch_softmax_ext._check import check_types

_op = torch.ops.torch_softmax_ext.cross_entropy.default
_inplace_op = torch.ops.torch_softmax_ext._cross_entropy_inplace_backward.default
_fast = _C.cross_entropy  # plain tensors only, else NotImplemented


def cross_entropy(
    input: Tensor,
    target: Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    inplace_backward: bool = False,
) -> Tensor:
    r"""Softmax cross-entropy between logits and class indices, fused: each logit is read once and its gradient
    written once; log-probabilities are never stored.

    .. math:: \ell_i = \log \sum_c \exp(x_{ic}) - x_{i, y_i}

    Same values, gradients and error classes as :func:`torch.nn.functional.cross_entropy`, with two differences: half
    precision logits give an fp32 loss, and the gradient of an ignored row is zero whatever its logits are.

    Args:
        input: logits of shape ``(C)``, ``(N, C)`` or ``(N, C, d1, …, dk)``; float32, float64, float16 or bfloat16; any
            strides. Half types are computed in float32. Numbers beyond ±2.3e38 count as infinite.
        target: class indices of shape ``()``, ``(N)`` or ``(N, d1, …, dk)``; int64 or int32; in ``[0, C)`` or
            ``ignore_index``.
        ignore_index: a target that is not counted: its loss and gradient are 0.
        inplace_backward: the gradient is written into ``input``'s memory, in the forward pass: one buffer of the
            logits' size in all. ``input`` must be a computed tensor, and must not be used afterwards; autograd raises
            where it was saved by somebody before. Double backward then raises. Without effect under
            ``torch.compile``, which plans memory itself, and for float16, whose gradients would underflow before a loss
            scale arrives. Not for ``torch.func.vmap``.
        reduction: ``"none"``, ``"mean"`` over the counted targets (NaN where there is none), or ``"sum"``.

    Returns:
        The loss in float32 (float64 for float64 logits): a scalar, or of ``target``'s shape for ``"none"``.

    Raises:
        IndexError: a target that is neither a class nor ``ignore_index`` (CPU; on CUDA a device-side assertion).
        ValueError: batch sizes that differ, an unknown ``reduction``.
        RuntimeError: other shapes that do not fit, a target that is not int64 or int32, tensors on two devices, a leaf
            or overlapping memory with ``inplace_backward``.
        NotImplementedError: logits that are not floating point; class probabilities as target.
        TypeError: an argument of another type.
    """
    if not torch.compiler.is_compiling():
        if inplace_backward:
            return _inplace_op(input, target, ignore_index, reduction)
        result = _fast(input, target, ignore_index, reduction)
        if result is not NotImplemented:
            return result
        check_types("cross_entropy", input=(input, Tensor), target=(target, Tensor), ignore_index=(ignore_index, int))
        if not isinstance(reduction, str):
            raise ValueError(f"cross_entropy: reduction: expected 'none', 'mean' or 'sum', got {reduction!r}")
    return _op(input, target, ignore_index=ignore_index, reduction=reduction)


class CrossEntropyLoss(nn.Module):
    """:func:`cross_entropy` as a module, with the keywords of :class:`torch.nn.CrossEntropyLoss`."""

    def __init__(self, *, ignore_index: int = -100, reduction: str = "mean", inplace_backward: bool = False) -> None:
        super().__init__()
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.inplace_backward = inplace_backward

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return cross_entropy(
            input,
            target,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            inplace_backward=self.inplace_backward,
        )

    def extra_repr(self) -> str:
        return (
            f"ignore_index={self.ignore_index}, reduction={self.reduction!r}, inplace_backward={self.inplace_backward}"
        )


@torch.library.register_vmap("torch_softmax_ext::cross_entropy")
def _vmap(info, in_dims, input, target, *, ignore_index=-100, reduction="mean"):
    """One call for the whole batch: its elements become rows, which are then reduced apart."""
    size = info.batch_size
    x = input.movedim(in_dims[0], 0) if in_dims[0] is not None else input.expand(size, *input.shape)
    t = target.movedim(in_dims[1], 0) if in_dims[1] is not None else target.expand(size, *target.shape)
    shape = t.shape
    if x.dim() == 2:  # (C) each, whose target may be of shape () or (1)
        x, t = x.unsqueeze(1), t.reshape(size, 1)
    loss = _op(x.flatten(0, 1), t.flatten(0, 1), ignore_index=ignore_index, reduction="none").reshape(shape)
    if reduction == "none":
        return loss, 0
    loss = loss.reshape(size, -1).sum(1)
    if reduction == "mean":
        loss = loss / (t != ignore_index).reshape(size, -1).sum(1)
    return loss, 0
