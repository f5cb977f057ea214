"""Log-probabilities of given classes, with the entropy: function, and the rules of torch.func.vmap."""

import torch
from torch import Tensor
from torch.compiler import is_compiling, is_dynamo_compiling

from torch_softmax_ext import _C, _numbers
from torch_softmax_ext._options import checked, split

_op = torch.ops.torch_softmax_ext.selective_log_softmax.default
_op_with_entropy = torch.ops.torch_softmax_ext.selective_log_softmax_with_entropy.default
_short_way = _C.selective_log_softmax  # plain tensors only, else NotImplemented
_short_way_with_entropy = _C.selective_log_softmax_with_entropy


def selective_log_softmax(
    input: Tensor,
    index: Tensor,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    return_entropy: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""``log_softmax(input, -1).gather(-1, index)`` and, if asked for, the entropy of each row: what policy-gradient
    training needs of the logits of a language model. Fused: each logit is read once, and no intermediate of the size of
    the logits is written or kept.

    .. math::
        s_{ic} = \frac{\text{softcap} \cdot \tanh(x_{ic} / \text{softcap})}{\text{temperature}}, \quad
        \text{logp}_{ik} = s_{i y_{ik}} - \log \sum_c \exp s_{ic}, \quad
        H_i = - \sum_c p_{ic} \log p_{ic}, \quad p_i = \text{softmax}(s_i)

    Without softcap, :math:`s_{ic} = x_{ic} / \text{temperature}`. Both results are differentiable. A log-probability is
    never positive, and both results are exactly 0 where one class has all the probability. The name is that of
    ``selective_log_softmax`` in TRL (https://github.com/huggingface/trl, ``trl/trainer/utils.py``).

    Args:
        input: logits of shape ``(…, C)``; float32, float64, float16 or bfloat16; any strides. Half types are computed
            in float32. If the classes are not contiguous, the CPU works on a copy.
        index: classes in ``[0, C)``, int64 or int32: one per row, shape ``(…)``, or several, shape ``(…, K)``, which
            may repeat.
        temperature: the logits, after softcap, are divided by it.
        softcap: bound on the absolute value of the logits; None for no bound.
        return_entropy: also return the entropy.

    Returns:
        Log-probabilities of ``index``'s shape in float32 (float64 for float64 logits). With ``return_entropy`` a tuple
        of them and the entropies, of shape ``(…)`` and the same dtype. A logit of ``-inf`` has log-probability ``-inf``
        and adds 0 to the entropy. A NaN, a ``+inf``, or a row of ``-inf`` alone makes its own row NaN.

    Raises:
        IndexError: an index is not a class (CPU; on CUDA a device-side assertion).
        ValueError: ``temperature`` or ``softcap`` is not positive.
        RuntimeError: shapes do not fit, ``index`` is neither int64 nor int32, or tensors are on different devices.
        NotImplementedError: ``input`` is not floating point.
        TypeError: an argument has another type.
    """
    args = (input, index, temperature, softcap)
    op = _op_with_entropy if return_entropy else _op
    if not is_dynamo_compiling():
        result = (_short_way_with_entropy if return_entropy else _short_way)(*args)
        if result is not NotImplemented:
            return result
    if is_compiling():
        return _numbers.selective_log_softmax(op, *split(args, _OPTIONS))
    tensors, options = split(checked(selective_log_softmax, args), _OPTIONS)
    return op(*tensors, **options)


_OPTIONS = ("temperature", "softcap")


def _batched(info, in_dims, input, index):
    """A batch is one more dimension of rows."""
    return (
        t.movedim(dim, 0) if dim is not None else t.expand(info.batch_size, *t.shape)
        for t, dim in zip((input, index), in_dims, strict=False)
    )


@torch.library.register_vmap(_op)
def _vmap(info, in_dims, input, index, **options):
    return _op(*_batched(info, in_dims, input, index), **options), 0


@torch.library.register_vmap(_op_with_entropy)
def _vmap_with_entropy(info, in_dims, input, index, **options):
    return _op_with_entropy(*_batched(info, in_dims, input, index), **options), (0, 0)
