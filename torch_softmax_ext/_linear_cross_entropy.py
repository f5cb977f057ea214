"""Cross-entropy of a linear layer's outputs without storing them: function, module, and the rule of
torch.func.vmap."""

import torch
from torch import Tensor
from torch.compiler import is_compiling, is_dynamo_compiling

from torch_softmax_ext import _C, _dtensor, _numbers
from torch_softmax_ext._options import FunctionModule, checked, options_of, split
from torch_softmax_ext._vmap import one_by_one

_op = torch.ops.torch_softmax_ext.linear_cross_entropy.default
_short_way = _C.linear_cross_entropy  # plain tensors only, else NotImplemented


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss_weight: float = 0.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    chunk_size: int | None = None,
) -> Tensor:
    r"""Softmax cross-entropy of the output of a linear layer, typically the last one of a language model, without
    storing that output: ``chunk_size`` rows of logits at a time are computed, in one buffer.

    .. math::
        x_i = W h_i + b, \quad
        s_{ic} = \frac{\text{softcap} \cdot \tanh(x_{ic} / \text{softcap})}{\text{temperature}}, \quad
        \text{lse}_i = \log \sum_c \exp s_{ic}, \quad
        \ell_i = \sum_c w_c \, q_{ic} \, (\text{lse}_i - s_{ic}) + \text{z\_loss\_weight} \cdot \text{lse}_i^2

    Without softcap, :math:`s_{ic} = x_{ic} / \text{temperature}`. With label smoothing :math:`\varepsilon`, the target
    distribution is :math:`q_i = (1 - \varepsilon) \, \text{onehot}(y_i) + \varepsilon / C` for a class index
    :math:`y_i`, and :math:`q_i = (1 - \varepsilon) \, \text{target}_i + \varepsilon / C` for class probabilities.

    Value and gradients are those of ``cross_entropy(linear(input, linear_weight, linear_bias), target)`` within
    rounding. The forward pass computes the gradients that are needed, chunk by chunk, for a ``grad_output`` of 1, and
    backward multiplies them by ``grad_output``. With ``reduction="none"``, and under checkpointing, backward computes
    each chunk again. Ignored rows cost no matrix product. The same inputs give the same bits, but a row's bits may
    depend on its chunk, as the bits of a matrix product do.

    In bfloat16, logits and their gradients are rounded to bfloat16, as after a linear layer; the gradients of weight
    and bias are summed over the chunks in float32. Float16 is computed in float32, matrix products included, on float32
    copies of a few thousand classes' weights at a time; its gradients stay in float32 until ``grad_output``, usually a
    loss scale, is known. Under autocast the inputs are cast to its dtype. On CUDA the host reads the targets, and waits
    for them, so the function cannot be captured in a CUDA graph. Double backward, ``torch.func``, forward-mode AD and
    gradients of class probabilities or class weights store all logits: they use torch's linear and
    :func:`cross_entropy`.

    After Cut Your Losses (arXiv:2411.09009) and Liger Kernel (arXiv:2410.10989). The arguments follow
    ``torch.nn.functional.linear_cross_entropy`` of torch 2.14.

    Args:
        input: hidden states of shape ``(…, H)``; float32, float64, float16 or bfloat16; any strides.
        linear_weight: weight of the linear layer, shape ``(C, H)``, ``input``'s dtype.
        target: class indices of shape ``(…)``; int64, int32 or uint8; each in ``[0, C)`` or ``ignore_index``. Or class
            probabilities of shape ``(…, C)``, floating point, differentiable. If their dtype differs from ``input``'s,
            the loss is computed in the wider of the two.
        linear_bias: bias of the linear layer, shape ``(C)``, ``input``'s dtype; None for no bias.
        weight: class weights of shape ``(C)``, floating point; None means 1. With class probabilities they may also be
            integers, and may require grad.
        ignore_index: a row with this target has loss 0 and gradient 0 and is not counted. Not with class probabilities.
        reduction: ``"none"``, ``"sum"`` or ``"mean"``. The mean divides by the total weight of all counted targets (for
            class probabilities by the number of rows), and the z-loss by their number. It is NaN if nothing is counted.
        label_smoothing: the share of the target that is spread evenly over all classes, in [0, 1].
        z_loss_weight: factor of the squared log-sum-exp of each counted row; class weights do not apply to it (PaLM,
            arXiv:2204.02311).
        softcap: bound on the absolute value of the logits (Gemma 2, arXiv:2408.00118); None for no bound.
        temperature: the logits, after softcap, are divided by it.
        chunk_size: the number of rows of logits in the buffer, which is float32 for float16 input. None: a ninth of the
            counted rows, but at least 256 and at most 1024.

    Returns:
        The loss in float32 (float64 for float64 input): a scalar, or for ``"none"`` one number per row, in the shape of
        class indices.

    Raises:
        IndexError: a target is neither a class nor ``ignore_index``, on CPU and CUDA.
        ValueError: class indices have another shape, ``reduction`` is unknown, ``chunk_size``, ``temperature`` or
            ``softcap`` is not positive, or ``z_loss_weight`` is not finite.
        RuntimeError: other shapes do not fit; ``linear_weight`` or ``linear_bias`` has another dtype than ``input``;
            ``target`` has an unsupported dtype; tensors are on different devices; ``weight`` requires grad with class
            indices; ``label_smoothing`` is outside [0, 1]; ``ignore_index`` is not negative with class probabilities.
        NotImplementedError: ``input`` is not floating point.
        TypeError: an argument has another type.
    """
    args = (input, linear_weight, target, linear_bias, weight)
    args += (ignore_index, reduction, label_smoothing, z_loss_weight, softcap, temperature, chunk_size)
    if not is_dynamo_compiling():
        result = _short_way(*args)
        if result is not NotImplemented:
            return result
    if is_compiling():
        return _numbers.linear_cross_entropy(_op, *split(args, _OPTIONS))
    tensors, options = split(checked(linear_cross_entropy, args), _OPTIONS)
    if reduction == "mean" and _dtensor.is_sharded(input):
        return _dtensor.mean(_op, tensors, options, target, class_dim=-1, weight=tensors[-1])
    return _op(*tensors, **options)


_OPTIONS = options_of(linear_cross_entropy)


class LinearCrossEntropyLoss(FunctionModule, function=linear_cross_entropy):
    """:func:`linear_cross_entropy` as a module.

    It does not hold the linear layer, whose weight is often shared with the embedding: weight and bias are arguments of
    each call, ``loss(hidden, lm_head.weight, target, lm_head.bias)``. Liger's ``LigerFusedLinearCrossEntropyLoss``
    takes the weight first.
    """

    def forward(
        self, input: Tensor, linear_weight: Tensor, target: Tensor, linear_bias: Tensor | None = None
    ) -> Tensor:
        return linear_cross_entropy(input, linear_weight, target, linear_bias=linear_bias, **self._arguments())


@torch.library.register_vmap(_op)
def _vmap(info, in_dims, *args, **options):
    """One call for each element: their linear weights may differ, and each fills a matrix product."""
    return one_by_one(_op, info, in_dims, args, options)
