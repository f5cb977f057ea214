"""Softmax cross-entropy: functions, module, and the rules of torch.func.vmap."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling, is_dynamo_compiling

from torch_softmax_ext import _C, _dtensor, _numbers
from torch_softmax_ext._options import FunctionModule, checked, options_of, split
from torch_softmax_ext._vmap import one_by_one

_op = torch.ops.torch_softmax_ext.cross_entropy.default
_inplace_op = torch.ops.torch_softmax_ext._cross_entropy_inplace_backward.default
_metrics_op = torch.ops.torch_softmax_ext.cross_entropy_with_metrics.default
_short_way = _C.cross_entropy  # plain tensors only, else NotImplemented
_short_way_with_metrics = _C.cross_entropy_with_metrics


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss_weight: float = 0.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    inplace_backward: bool = False,
) -> Tensor:
    r"""Softmax cross-entropy between logits and class indices or class probabilities, fused: each logit is read once
    and its gradient written once; log-probabilities are never stored.

    .. math::
        s_{ic} = \frac{\text{softcap} \cdot \tanh(x_{ic} / \text{softcap})}{\text{temperature}}, \quad
        \text{lse}_i = \log \sum_c \exp s_{ic}, \quad
        \ell_i = \sum_c w_c \, q_{ic} \, (\text{lse}_i - s_{ic}) + \text{z\_loss\_weight} \cdot \text{lse}_i^2

    with :math:`q_i = (1 - \varepsilon) \, \text{onehot}(y_i) + \varepsilon / C` for a class index :math:`y_i` and
    label smoothing :math:`\varepsilon`, or :math:`(1 - \varepsilon) \, \text{target}_i + \varepsilon / C`. Without
    softcap the fraction is :math:`x_{ic} / \text{temperature}`.

    Same values, gradients and error classes as :func:`torch.nn.functional.cross_entropy`, with these differences: half
    precision logits give an fp32 loss, the gradient of an ignored row is zero whatever its logits are, and
    ``label_smoothing`` below 0 raises. Loss and gradient of a nearly certain target keep all their digits; double
    backward, ``torch.func`` and forward-mode AD go through torch's own operators, and have theirs.

    Args:
        input: logits of shape ``(C)``, ``(N, C)`` or ``(N, C, d1, …, dk)``; float32, float64, float16 or bfloat16; any
            strides. Half types are computed in float32. Finite logits may be of any size.
        target: class indices of shape ``()``, ``(N)`` or ``(N, d1, …, dk)``; int64, int32 or uint8; in ``[0, C)`` or
            ``ignore_index``. Or class probabilities of ``input``'s shape, floating point, differentiable, too; of
            another dtype than ``input`` both are computed in the wider one.
        weight: of the classes, shape ``(C)``, floating point; with class probabilities integers, too, and
            differentiable, then by a composition of torch's operators; None: 1.
        ignore_index: a target that is not counted: its loss and gradient are 0. Not with class probabilities.
        reduction: ``"none"``, ``"sum"``, or ``"mean"``: the sum divided by the weights of the counted targets (by the
            number of rows for class probabilities), the z-loss by their number; NaN where there is none.
        label_smoothing: part of the target that is spread evenly over the classes, in [0, 1].
        z_loss_weight: of the squared log-sum-exp of each counted row, without class weight (PaLM, arXiv:2204.02311).
        softcap: bound of the logits (Gemma 2, arXiv:2408.00118); None: none.
        temperature: what the logits, capped, are divided by.
        inplace_backward: the gradient is written into ``input``'s memory, in the forward pass: one buffer of the
            logits' size in all. ``input`` must be a computed tensor, and must not be used afterwards: autograd raises
            in backward of such a use, and where it was saved by somebody before. Double backward then raises. Without
            effect under ``torch.compile``, which plans memory itself, for float16, whose gradients would underflow
            before a loss scale arrives, for a target that requires grad, and for class probabilities of another dtype
            than ``input``. Not for ``torch.func.vmap``. An infinite ``grad_output`` makes ignored rows NaN, too.

    Returns:
        The loss in float32 (float64 for float64 logits): a scalar, or one number a row, of the shape of class indices,
        for ``"none"``.

    Raises:
        IndexError: a target that is neither a class nor ``ignore_index`` (CPU; on CUDA a device-side assertion).
        ValueError: batch sizes that differ, an unknown ``reduction``, a ``temperature`` or ``softcap`` that is not
            positive, a ``z_loss_weight`` that is not finite.
        RuntimeError: other shapes that do not fit, a target of another dtype, tensors on two devices, a ``weight`` of
            another shape or, with class indices, one that requires grad, ``label_smoothing`` outside [0, 1], a
            non-negative ``ignore_index`` with class probabilities; with ``inplace_backward`` a leaf, or memory that
            overlaps or holds ``target`` or ``weight``, too.
        NotImplementedError: logits that are not floating point.
        TypeError: an argument of another type.
    """
    args = (input, target, weight, ignore_index, reduction, label_smoothing, z_loss_weight, softcap, temperature)
    if not (inplace_backward or is_dynamo_compiling()):
        result = _short_way(*args)
        if result is not NotImplemented:
            return result
    if is_compiling():
        return _numbers.cross_entropy(_op, *split(args, _OPTIONS))
    tensors, options = split(checked(cross_entropy, args), _OPTIONS)
    if reduction == "mean" and _dtensor.is_sharded(input):
        return _dtensor.mean(_op, tensors, options, target, class_dim=min(1, input.dim() - 1))
    return (_inplace_op if inplace_backward else _op)(*tensors, **options)


class CrossEntropyMetrics(NamedTuple):
    """What :func:`cross_entropy_with_metrics` returns."""

    loss: Tensor
    z_loss: Tensor
    lse: Tensor
    accuracy: Tensor
    predictions: Tensor


def cross_entropy_with_metrics(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss_weight: float = 0.0,
    softcap: float | None = None,
    temperature: float = 1.0,
) -> CrossEntropyMetrics:
    r"""What is logged beside a loss, from the same reading of the logits: :func:`cross_entropy` and

    .. math::
        \text{lse}_i = \log \sum_c \exp s_{ic}, \quad \text{predictions}_i = \arg\max_c x_{ic}, \quad
        \text{accuracy} = \frac{\#\{i \text{ counted} : \text{predictions}_i = y_i\}}{\#\{i \text{ counted}\}}

    Args:
        input: logits; as :func:`cross_entropy`.
        target: class indices or class probabilities; with the latter, accuracy is against their largest.
        weight: of the classes, shape ``(C)``.
        ignore_index: a target that is not counted.
        reduction: of ``loss`` and ``z_loss``.
        label_smoothing: part of the target that is spread evenly over the classes.
        z_loss_weight: of the squared log-sum-exp.
        softcap: bound of the logits; None: none.
        temperature: what the logits, capped, are divided by.

    Returns:
        CrossEntropyMetrics: ``loss``, z-loss included; ``z_loss``, that part of it; ``lse``, of the shape of class
        indices, 0 where ignored; these in the loss' dtype and differentiable. ``accuracy``, a float32 scalar, NaN where
        nothing is counted; ``predictions``, int64 of the same shape as ``lse``, ``ignore_index`` where ignored, the
        first of equal logits; not differentiable.

    Raises:
        TypeError: an argument of another type.
        Exception: as :func:`cross_entropy`.
    """
    args = (input, target, weight, ignore_index, reduction, label_smoothing, z_loss_weight, softcap, temperature)
    if not is_dynamo_compiling():
        result = _short_way_with_metrics(*args)
        if result is not NotImplemented:
            return CrossEntropyMetrics(*result)
    if is_compiling():
        return CrossEntropyMetrics(*_numbers.cross_entropy(_metrics_op, *split(args, _OPTIONS)))
    tensors, options = split(checked(cross_entropy_with_metrics, args), _OPTIONS)
    op = _dtensor.metrics if _dtensor.is_sharded(input) else _metrics_op
    return CrossEntropyMetrics(*op(*tensors, **options))


_OPTIONS = options_of(cross_entropy_with_metrics)


class CrossEntropyLoss(FunctionModule, nn.CrossEntropyLoss, function=cross_entropy):
    """:func:`cross_entropy` as a module: a :class:`torch.nn.CrossEntropyLoss` with further options."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return cross_entropy(input, target, **self._arguments())


def _check_batch(info):
    if info.batch_size == 0:
        raise ValueError("cross_entropy: input: expected at least one element of the batch under vmap, got none")


@torch.library.register_vmap(_op)
def _vmap(info, in_dims, input, target, weight=None, **options):
    """One call for the whole batch: its elements become rows, whose losses are then reduced element by element. Where
    each element has its own class weights, one call for each."""
    _check_batch(info)
    size = info.batch_size
    in_dims = (*in_dims, None)[:3]
    if in_dims[2] is not None:
        return one_by_one(_op, info, in_dims, (input, target, weight), options)
    options = {**_OPTIONS, **options}
    reduction = options["reduction"]

    def batched(t, dim):
        return t.movedim(dim, 0) if dim is not None else t.expand(size, *t.shape)

    x, t = batched(input, in_dims[0]), batched(target, in_dims[1])
    indices = not t.is_floating_point()
    if t.dtype == torch.uint8:  # which cannot hold ignore_index
        t = t.int()
    shape = t.shape if indices else x.select(min(2, x.dim() - 1), 0).shape
    if x.dim() == 2:  # elements of shape (C), whose targets have shape () or (1)
        x, t, shape = x.unsqueeze(1), t.reshape(size, 1) if indices else t.unsqueeze(1), (size,)
    x, t = x.flatten(0, 1), t.flatten(0, 1)

    def row_losses(**changes):
        return _op(x, t, weight, **{**options, "reduction": "none", **changes})

    def sums(rows):
        return rows.reshape(size, -1).sum(1)

    loss = row_losses()
    if reduction == "none":
        return loss.reshape(shape), 0
    if reduction == "sum":
        return sums(loss), 0
    counted = t != options["ignore_index"] if indices else torch.ones_like(loss, dtype=torch.bool)
    count = sums(counted)
    if weight is None or not indices:
        return sums(loss) / count, 0
    main = row_losses(z_loss_weight=0.0)  # without the z-loss, whose divisor is the count
    zero = torch.zeros((), dtype=loss.dtype, device=t.device)
    total = weight.to(loss.dtype)[t.where(counted, 0)].where(counted, zero)
    return sums(main) / sums(total) + sums(loss - main) / count, 0


@torch.library.register_vmap(_metrics_op)
def _vmap_metrics(info, in_dims, input, target, weight=None, **options):
    """One call for each element: each has its own accuracy and divisors."""
    _check_batch(info)
    return one_by_one(_metrics_op, info, (*in_dims, None)[:3], (input, target, weight), options)
