"""Softmax cross-entropy: functions, module, and the rules of torch.func.vmap."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling, is_dynamo_compiling

from torch_softmax_ext import _C, _dtensor, _numbers
from torch_softmax_ext._options import FunctionModule, checked, options_of, split
from torch_softmax_ext._vmap import batch_as_rows, one_by_one

_op = torch.ops.torch_softmax_ext.cross_entropy.default
_inplace_op = torch.ops.torch_softmax_ext._cross_entropy_forward_inplace.default
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
    r"""Softmax cross-entropy between logits and class indices or class probabilities. Fused: each logit is read once,
    its gradient is written once, and log-probabilities are never stored.

    .. math::
        s_{ic} = \frac{\text{softcap} \cdot \tanh(x_{ic} / \text{softcap})}{\text{temperature}}, \quad
        \text{lse}_i = \log \sum_c \exp s_{ic}, \quad
        \ell_i = \sum_c w_c \, q_{ic} \, (\text{lse}_i - s_{ic}) + \text{z\_loss\_weight} \cdot \text{lse}_i^2

    Without softcap, :math:`s_{ic} = x_{ic} / \text{temperature}`. With label smoothing :math:`\varepsilon`, the target
    distribution is :math:`q_i = (1 - \varepsilon) \, \text{onehot}(y_i) + \varepsilon / C` for a class index
    :math:`y_i`, and :math:`q_i = (1 - \varepsilon) \, \text{target}_i + \varepsilon / C` for class probabilities.

    Values, gradients and error classes are those of :func:`torch.nn.functional.cross_entropy`, with three differences:
    the loss of half-precision logits is float32; an ignored row has a zero gradient even if its logits are not finite;
    a negative ``label_smoothing`` raises. Loss and gradient of a nearly certain target keep all their digits. Double
    backward, ``torch.func`` and forward-mode AD compute with torch's own operators, at their precision.

    Args:
        input: logits of shape ``(C)``, ``(N, C)`` or ``(N, C, d1, …, dk)``; float32, float64, float16 or bfloat16; any
            strides. Half types are computed in float32. Finite logits may be of any size.
        target: class indices of shape ``()``, ``(N)`` or ``(N, d1, …, dk)``; int64, int32 or uint8; each in ``[0, C)``
            or ``ignore_index``. Or class probabilities: floating point, of ``input``'s shape, differentiable. If their
            dtype differs from ``input``'s, the wider of the two is used.
        weight: class weights of shape ``(C)``, floating point; None means 1. With class probabilities they may also be
            integers, and may require grad; the gradient then comes from torch's own operators.
        ignore_index: a row with this target has loss 0 and gradient 0 and is not counted. Not with class probabilities.
        reduction: ``"none"``, ``"sum"`` or ``"mean"``. The mean divides by the total weight of the counted targets (for
            class probabilities by the number of rows), and the z-loss by their number. It is NaN if nothing is counted.
        label_smoothing: the share of the target that is spread evenly over all classes, in [0, 1].
        z_loss_weight: factor of the squared log-sum-exp of each counted row; class weights do not apply to it (PaLM,
            arXiv:2204.02311).
        softcap: bound on the absolute value of the logits (Gemma 2, arXiv:2408.00118); None for no bound.
        temperature: the logits, after softcap, are divided by it.
        inplace_backward: write the gradient into ``input``'s memory during the forward pass, so that logits and
            gradient share one buffer. ``input`` must be the result of a computation, and nothing may use it afterwards:
            autograd raises if something did, or if an earlier operation saved it. Double backward raises, and
            ``torch.func.vmap`` is not supported. The option has no effect under ``torch.compile``, which plans memory
            itself; for float16, whose gradients would underflow before the loss scale is known; for a target that
            requires grad; and for class probabilities of another dtype than ``input``. If ``grad_output`` is infinite,
            the gradient of ignored rows is NaN.

    Returns:
        The loss in float32 (float64 for float64 logits): a scalar, or for ``"none"`` one number per row, in the shape
        of class indices.

    Raises:
        IndexError: a target is neither a class nor ``ignore_index`` (CPU; on CUDA a device-side assertion).
        ValueError: batch sizes differ, ``reduction`` is unknown, ``temperature`` or ``softcap`` is not positive, or
            ``z_loss_weight`` is not finite.
        RuntimeError: other shapes do not fit; ``target`` has an unsupported dtype; tensors are on different devices;
            ``weight`` has the wrong shape, or requires grad with class indices; ``label_smoothing`` is outside [0, 1];
            ``ignore_index`` is not negative with class probabilities. With ``inplace_backward`` also: ``input`` is a
            leaf that requires grad, or its memory overlaps itself, ``target`` or ``weight``.
        NotImplementedError: ``input`` is not floating point.
        TypeError: an argument has another type.
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
        return _dtensor.mean(_op, tensors, options, target, class_dim=min(1, input.dim() - 1), weight=tensors[-1])
    return (_inplace_op if inplace_backward else _op)(*tensors, **options)


class CrossEntropyMetrics(NamedTuple):
    """The result of :func:`cross_entropy_with_metrics`."""

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
    r""":func:`cross_entropy` together with what training logs beside it, from the same pass over the logits:

    .. math::
        \text{lse}_i = \log \sum_c \exp s_{ic}, \quad \text{predictions}_i = \arg\max_c x_{ic}, \quad
        \text{accuracy} = \frac{\#\{i \text{ counted} : \text{predictions}_i = y_i\}}{\#\{i \text{ counted}\}}

    Args:
        input: logits, as for :func:`cross_entropy`; at least one class.
        target: class indices or class probabilities. The accuracy of probabilities is measured against the largest.
        weight: class weights of shape ``(C)``; None means 1.
        ignore_index: a row with this target is not counted.
        reduction: applies to ``loss`` and ``z_loss``.
        label_smoothing: the share of the target that is spread evenly over all classes.
        z_loss_weight: factor of the squared log-sum-exp of each counted row.
        softcap: bound on the absolute value of the logits; None for no bound.
        temperature: the logits, after softcap, are divided by it.

    Returns:
        CrossEntropyMetrics: a named tuple. Differentiable, in the dtype of the loss: ``loss``, which includes the
        z-loss; ``z_loss``, that part alone; ``lse``, in the shape of class indices, 0 in ignored rows. Not
        differentiable: ``accuracy``, a float32 scalar, NaN if nothing is counted; ``predictions``, int64 in the shape
        of ``lse``, the first of equal logits, ``ignore_index`` in ignored rows.

    Raises:
        TypeError: an argument has another type.
        Exception: whatever :func:`cross_entropy` raises.
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

    x, t, shape = batch_as_rows(info, in_dims, input, target)
    indices = not t.is_floating_point()

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
