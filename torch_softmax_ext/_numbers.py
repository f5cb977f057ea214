"""Numbers that change from step to step under torch.compile: z_loss_weight, softcap, temperature and alpha.

A float argument of an operator is a constant of the graph, and each new value compiles again. A float that
torch.compile has seen change becomes a tensor of the graph (its ``SymFloat``), as long as only operations on tensors
use it. Maps and the losses of entmax take a tensor in the place of a number anyway. Each private operator of the other
losses has a twin that takes the three numbers as one float64 tensor on the CPU and reads it when it runs.
"""

import math

import torch
from torch import Tensor

_ops = torch.ops.torch_softmax_ext
_library = torch.library.Library("torch_softmax_ext", "FRAGMENT")
_NUMBERS = {"z_loss_weight": 0.0, "softcap": None, "temperature": 1.0}  # their order in the tensor, where NaN is None
_ANY = (0.5, 1.0, 1.0)  # shapes depend on none of them


def _define_twin(name: str) -> None:
    """``{name}_of_numbers``, which has a tensor in the place of the numbers."""
    overload = getattr(_ops, name).default
    schema = str(overload._schema).removeprefix("torch_softmax_ext::")
    three = "float z_loss_weight, float? softcap, float temperature"
    two = "float temperature, float? softcap"
    has_z_loss = three in schema
    position = [a.name for a in overload._schema.arguments].index("z_loss_weight" if has_z_loss else "temperature")

    def expanded(args, z_loss_weight, softcap, temperature):
        softcap = None if math.isnan(softcap) else softcap
        values = (z_loss_weight, softcap, temperature) if has_z_loss else (temperature, softcap)
        return overload(*args[:position], *values, *args[position + 1 :])

    def run(*args):
        return expanded(args, *args[position].tolist())

    def shapes(*args):
        return expanded(args, *_ANY)

    twin = f"{name}_of_numbers"
    _library.define(
        schema.replace(name, twin, 1).replace(three, "Tensor numbers").replace(two, "Tensor numbers"),
        tags=(torch.Tag.pt2_compliant_tag,),
    )
    for key in ("CPU", "CUDA"):
        _library.impl(twin, run, key)
    _library.impl(twin, shapes, "Meta")


for _name in ("_cross_entropy", "_cross_entropy_metrics", "_linear_cross_entropy", "_selective_log_softmax"):
    _define_twin(f"{_name}_forward")
for _name in ("_cross_entropy", "_linear_cross_entropy", "_selective_log_softmax"):
    _define_twin(f"{_name}_backward")


def to_tensor(number) -> Tensor:
    """A float64 tensor on the CPU; of None, NaN."""
    if number is None:
        number = math.nan
    if isinstance(number, int | float):  # torch.compile turns this product into a tensor
        return torch.ones((), dtype=torch.float64, device="cpu") * number
    return torch.as_tensor(number).detach().to("cpu", torch.float64).reshape(())


def _pack(options) -> tuple[Tensor, tuple]:
    """The three numbers in a tensor, and the other options."""
    numbers = torch.stack([to_tensor(options.get(name, default)) for name, default in _NUMBERS.items()])
    return numbers, tuple(value for name, value in options.items() if name not in _NUMBERS)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, numbers, options, input, target, weight):
        loss, stats = _ops._cross_entropy_forward_of_numbers(input, target, weight, *options, numbers)
        ctx.save_for_backward(input, target, weight, numbers, stats)
        ctx.options = options
        return loss

    @staticmethod
    def backward(ctx, grad):
        input, target, weight, numbers, stats = ctx.saved_tensors
        backward = _ops._cross_entropy_backward_of_numbers
        grad_input = backward(grad, None, input, target, stats, weight, *ctx.options, numbers)
        return None, None, grad_input, None, None


class _Metrics(torch.autograd.Function):
    @staticmethod
    def forward(ctx, numbers, options, input, target, weight):
        forward = _ops._cross_entropy_metrics_forward_of_numbers
        loss, stats, z_loss, lse, accuracy, predictions = forward(input, target, weight, *options, numbers)
        ctx.save_for_backward(input, target, weight, numbers, stats, lse)
        ctx.mark_non_differentiable(accuracy, predictions)
        ctx.options = options
        return loss, z_loss, lse, accuracy, predictions

    @staticmethod
    def backward(ctx, grad, grad_z_loss, grad_lse, *_):
        input, target, weight, numbers, stats, lse = ctx.saved_tensors
        _, reduction, _ = ctx.options
        of_z_loss = 2 * lse * grad_z_loss * numbers[0].to(lse.dtype)
        if reduction == "mean":
            of_z_loss = of_z_loss / stats[1].to(lse.dtype)
        backward = _ops._cross_entropy_backward_of_numbers
        grad_input = backward(grad, grad_lse + of_z_loss, input, target, stats, weight, *ctx.options, numbers)
        return None, None, grad_input, None, None


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, numbers, options, *tensors):
        input, linear_weight, _, linear_bias, _ = tensors
        *options, chunk_size = options
        wanted = [t is not None and t.requires_grad for t in (input, linear_weight, linear_bias)]
        in_forward = [w and options[1] != "none" for w in wanted]
        forward = _ops._linear_cross_entropy_forward_of_numbers
        loss, *gradients = forward(*tensors, *options, numbers, chunk_size, *in_forward)
        ctx.save_for_backward(*tensors, numbers, *gradients)
        ctx.options, ctx.wanted, ctx.chunk_size = options, wanted, chunk_size
        return loss

    @staticmethod
    def backward(ctx, grad):
        *tensors, numbers, _, _, _ = ctx.saved_tensors
        gradients = ctx.saved_tensors[-3:]
        if ctx.options[1] == "none":
            backward = _ops._linear_cross_entropy_backward_of_numbers
            gradients = backward(grad, *tensors, *ctx.options, numbers, ctx.chunk_size, *ctx.wanted)
            grad = 1
        input, weight, bias = (
            (g * grad).to(tensors[0].dtype) if w else None for g, w in zip(gradients, ctx.wanted, strict=True)
        )
        return None, None, input, weight, None, bias, None


class _Selective(torch.autograd.Function):
    @staticmethod
    def forward(ctx, numbers, options, input, index):
        (entropy,) = options
        logp, h, stats = _ops._selective_log_softmax_forward_of_numbers(input, index, entropy, numbers)
        ctx.save_for_backward(input, index, numbers, stats)
        return (logp, h) if entropy else logp

    @staticmethod
    def backward(ctx, grad_logp, grad_entropy=None):
        input, index, numbers, stats = ctx.saved_tensors
        backward = _ops._selective_log_softmax_backward_of_numbers
        return None, None, backward(grad_logp, grad_entropy, input, index, stats, numbers), None


def is_dynamic(number) -> bool:
    """Whether it is not a constant of the graph."""
    from torch.fx.experimental.symbolic_shapes import has_static_value  # loads sympy, which only graphs need

    return not isinstance(number, int | float) or not has_static_value(number)


def _are_dynamic(options) -> bool:
    return any(is_dynamic(options[name]) for name in _NUMBERS if options.get(name) is not None)


def _differentiate(*tensors) -> bool:
    return any(t is not None and t.requires_grad for t in tensors)


def cross_entropy(op, tensors, options):
    """``op(*tensors, **options)`` in a graph, with or without metrics. The twins have no gradient for class
    probabilities and class weights: where these require grad, each number is compiled for."""
    input, target, weight = tensors
    if _differentiate(target, weight) or not _are_dynamic(options):
        return op(*tensors, **options)
    if target.is_floating_point() and target.dtype != input.dtype:
        wider = torch.promote_types(input.dtype, target.dtype)
        input, target = input.to(wider), target.to(wider)
    function = _CrossEntropy if op is _ops.cross_entropy.default else _Metrics
    return function.apply(*_pack(options), input, target, weight)


def linear_cross_entropy(op, tensors, options):
    """As :func:`cross_entropy`."""
    input, linear_weight, target, linear_bias, weight = tensors
    if _differentiate(target, weight) or not _are_dynamic(options):
        return op(*tensors, **options)
    device = input.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        input, linear_weight = input.to(dtype), linear_weight.to(dtype)
        linear_bias = None if linear_bias is None else linear_bias.to(dtype)
    return _Linear.apply(*_pack(options), input, linear_weight, target, linear_bias, weight)


def selective_log_softmax(op, tensors, options):
    """As :func:`cross_entropy`."""
    if not _are_dynamic(options):
        return op(*tensors, **options)
    numbers, _ = _pack(options)
    entropy = op is _ops.selective_log_softmax_with_entropy.default
    return _Selective.apply(numbers, (entropy,), *tensors)
