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
    r"""Softmax cross-entropy of a linear layer, the last one of a language model, without its logits: they are computed
    ``chunk_size`` rows at a time, into one buffer.

    .. math::
        x_i = W h_i + b, \quad
        s_{ic} = \frac{\text{softcap} \cdot \tanh(x_{ic} / \text{softcap})}{\text{temperature}}, \quad
        \text{lse}_i = \log \sum_c \exp s_{ic}, \quad
        \ell_i = \sum_c w_c \, q_{ic} \, (\text{lse}_i - s_{ic}) + \text{z\_loss\_weight} \cdot \text{lse}_i^2

    with :math:`q_i = (1 - \varepsilon) \, \text{onehot}(y_i) + \varepsilon / C` for a class index :math:`y_i` and
    label smoothing :math:`\varepsilon`, or :math:`(1 - \varepsilon) \, \text{target}_i + \varepsilon / C`. Without
    softcap the fraction is :math:`x_{ic} / \text{temperature}`.

    The same as ``cross_entropy(linear(input, linear_weight, linear_bias), target)`` in value and gradients, within
    rounding. Where a gradient is asked for, the forward pass computes it, chunk by chunk, for an incoming gradient of
    1, and backward multiplies; with ``reduction="none"`` and in checkpoints, backward computes each chunk once more.
    Only the gradients that are asked for are computed. Ignored rows take no part: they cost no matrix product. The same
    inputs give the same bits; a row's bits may depend on its chunk, as those of a matrix product do.

    In bfloat16, logits and their gradients are rounded to the dtype, as behind a linear layer; the gradients of weight
    and bias are added up over the chunks in float32. Float16 is computed in float32, matrix products included, from
    copies of a few thousand classes' weights at a time; its gradients are kept in float32 until the incoming gradient,
    a loss scale mostly, is known. Under autocast the inputs are cast to its dtype.
    On CUDA the targets are looked at by the host, which waits for them: not for CUDA graphs.
    Double backward, ``torch.func``, forward-mode AD and gradients of class probabilities or class weights hold all
    logits: they take torch's linear and :func:`cross_entropy`.

    After Cut Your Losses (arXiv:2411.09009) and Liger Kernel (arXiv:2410.10989); arguments as
    ``torch.nn.functional.linear_cross_entropy`` of torch 2.14.

    Args:
        input: hidden states of shape ``(…, H)``; float32, float64, float16 or bfloat16; any strides.
        linear_weight: of the linear layer, shape ``(C, H)``, ``input``'s dtype.
        target: class indices of shape ``(…)``; int64, int32 or uint8; in ``[0, C)`` or ``ignore_index``. Or class
            probabilities of shape ``(…, C)``, floating point, differentiable, too; of another dtype than ``input``, the
            loss is computed in the wider one.
        linear_bias: of the linear layer, shape ``(C)``, ``input``'s dtype; None: none.
        weight: of the classes, shape ``(C)``, floating point; with class probabilities integers, too, and
            differentiable; None: 1.
        ignore_index: a target that is not counted: its loss and gradient are 0. Not with class probabilities.
        reduction: ``"none"``, ``"sum"``, or ``"mean"``: the sum divided by the weights of all counted targets (by the
            number of rows for class probabilities), the z-loss by their number; NaN where there is none.
        label_smoothing: part of the target that is spread evenly over the classes, in [0, 1].
        z_loss_weight: of the squared log-sum-exp of each counted row, without class weight (PaLM, arXiv:2204.02311).
        softcap: bound of the logits (Gemma 2, arXiv:2408.00118); None: none.
        temperature: what the logits, capped, are divided by.
        chunk_size: how many rows of logits there are at a time, those of float16 in float32. None: a
            ninth of the counted rows, between 256 and 1024.

    Returns:
        The loss in float32 (float64 for float64 input): a scalar, or of the shape of class indices for ``"none"``.

    Raises:
        IndexError: a target that is neither a class nor ``ignore_index``, on CPU and CUDA.
        ValueError: class indices of another shape, an unknown ``reduction``, a ``chunk_size``, ``temperature`` or
            ``softcap`` that is not positive, a ``z_loss_weight`` that is not finite.
        RuntimeError: other shapes that do not fit, another dtype of ``linear_weight`` or ``linear_bias`` than
            ``input``'s, a target of another dtype, tensors on two devices, with class indices a ``weight`` that
            requires grad, ``label_smoothing`` outside [0, 1], a non-negative ``ignore_index`` with class probabilities.
        NotImplementedError: input that is not floating point.
        TypeError: an argument of another type.
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
        return _dtensor.mean(_op, tensors, options, target, class_dim=-1)
    return _op(*tensors, **options)


_OPTIONS = options_of(linear_cross_entropy)


class LinearCrossEntropyLoss(FunctionModule, function=linear_cross_entropy):
    """:func:`linear_cross_entropy` as a module. The linear layer is not part of it: its weight, often shared with the
    embedding, and its bias come with each call, in the order of :func:`linear_cross_entropy` (Liger's
    ``LigerFusedLinearCrossEntropyLoss`` has the weight first: ``loss(lm_head.weight, hidden, target, lm_head.bias)``).
    """

    def forward(
        self, input: Tensor, linear_weight: Tensor, target: Tensor, linear_bias: Tensor | None = None
    ) -> Tensor:
        return linear_cross_entropy(input, linear_weight, target, linear_bias=linear_bias, **self._arguments())


@torch.library.register_vmap(_op)
def _vmap(info, in_dims, *args, **options):
    """One call for each element: their linear weights may differ, and each fills a matrix product."""
    return one_by_one(_op, info, in_dims, args, options)
