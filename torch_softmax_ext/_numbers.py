"""Numbers that change from step to step under torch.compile: z_loss_weight, softcap and temperature in one tensor.

A float in an operator's schema is part of the graph, and each value would be compiled for. torch.compile passes a float
that it has seen change as a tensor (its ``SymFloat``), as long as all that is done with it are operations of tensors.
So each private operator has a twin with its three numbers in a float64 tensor on the CPU, which is read when it runs.
"""

import math

import torch
from torch import Tensor

_ops = torch.ops.torch_softmax_ext
_library = torch.library.Library("torch_softmax_ext", "FRAGMENT")
_ANY = (0.5, 1.0, 1.0)  # shapes depend on none of them


def _define_twin(name: str) -> None:
    """``name`` with "numbers" in the place of its three: z_loss_weight, softcap (NaN: None), temperature."""
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


def are_dynamic(*numbers, also_differentiable=()) -> bool:
    """In a graph: whether some number is no constant. Never where a tensor is differentiated that the twins have no
    gradient of: class probabilities and class weights."""
    if any(t is not None and t.requires_grad for t in also_differentiable):
        return False
    from torch.fx.experimental.symbolic_shapes import has_static_value  # sympy with it, which only graphs need

    return any(not isinstance(n, int | float) or not has_static_value(n) for n in numbers if n is not None)


def _tensor(z_loss_weight, softcap, temperature) -> Tensor:
    one = torch.ones((), dtype=torch.float64, device="cpu")  # a product is what torch.compile makes a tensor of

    def to_tensor(number):
        if isinstance(number, int | float):
            return one * number
        return torch.as_tensor(number).detach().to("cpu", torch.float64).reshape(())

    return torch.stack([to_tensor(n) for n in (z_loss_weight, math.nan if softcap is None else softcap, temperature)])


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, target, weight, numbers, ignore_index, reduction, label_smoothing):
        options = (ignore_index, reduction, label_smoothing)
        loss, stats = _ops._cross_entropy_forward_of_numbers(input, target, weight, *options, numbers)
        ctx.save_for_backward(input, target, weight, numbers, stats)
        ctx.options = options
        return loss

    @staticmethod
    def backward(ctx, grad):
        input, target, weight, numbers, stats = ctx.saved_tensors
        backward = _ops._cross_entropy_backward_of_numbers
        grad_input = backward(grad, None, input, target, stats, weight, *ctx.options, numbers)
        return grad_input, None, None, None, None, None, None


class _Metrics(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, target, weight, numbers, ignore_index, reduction, label_smoothing):
        options = (ignore_index, reduction, label_smoothing)
        forward = _ops._cross_entropy_metrics_forward_of_numbers
        loss, stats, *rest = forward(input, target, weight, *options, numbers)
        z_loss, lse, accuracy, predictions = rest
        ctx.save_for_backward(input, target, weight, numbers, stats, lse)
        ctx.mark_non_differentiable(accuracy, predictions)
        ctx.options = options
        return loss, z_loss, lse, accuracy, predictions

    @staticmethod
    def backward(ctx, grad, grad_z_loss, grad_lse, *_):
        input, target, weight, numbers, stats, lse = ctx.saved_tensors
        of_z_loss = 2 * lse * grad_z_loss * numbers[0].to(lse.dtype)
        if ctx.options[1] == "mean":
            of_z_loss = of_z_loss / stats[1].to(lse.dtype)
        backward = _ops._cross_entropy_backward_of_numbers
        grad_input = backward(grad, grad_lse + of_z_loss, input, target, stats, weight, *ctx.options, numbers)
        return grad_input, None, None, None, None, None, None


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, linear_weight, linear_bias, target, weight, numbers, options, chunk_size):
        wanted = [t is not None and t.requires_grad for t in (input, linear_weight, linear_bias)]
        now = [w and options[1] != "none" for w in wanted]
        forward = _ops._linear_cross_entropy_forward_of_numbers
        loss, *gradients = forward(
            input, linear_weight, target, linear_bias, weight, *options, numbers, chunk_size, *now
        )
        ctx.save_for_backward(input, linear_weight, linear_bias, target, weight, numbers, *gradients)
        ctx.options, ctx.wanted, ctx.chunk_size = options, wanted, chunk_size
        return loss

    @staticmethod
    def backward(ctx, grad):
        input, linear_weight, linear_bias, target, weight, numbers, *gradients = ctx.saved_tensors
        if ctx.options[1] == "none":
            gradients = _ops._linear_cross_entropy_backward_of_numbers(
                grad,
                input,
                linear_weight,
                target,
                linear_bias,
                weight,
                *ctx.options,
                numbers,
                ctx.chunk_size,
                *ctx.wanted,
            )
            grad = 1
        of = [(g * grad).to(input.dtype) if w else None for g, w in zip(gradients, ctx.wanted, strict=True)]
        return *of, None, None, None, None, None


class _Selective(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, index, numbers, entropy):
        logp, h, stats = _ops._selective_log_softmax_forward_of_numbers(input, index, numbers, entropy)
        ctx.save_for_backward(input, index, numbers, stats)
        ctx.entropy = entropy
        return (logp, h) if entropy else logp

    @staticmethod
    def backward(ctx, grad_logp, grad_entropy=None):
        input, index, numbers, stats = ctx.saved_tensors
        backward = _ops._selective_log_softmax_backward_of_numbers
        return backward(grad_logp, grad_entropy, input, index, stats, numbers), None, None, None


def cross_entropy(input, target, weight, *, z_loss_weight, softcap, temperature, metrics=False, **options):
    numbers = _tensor(z_loss_weight, softcap, temperature)
    if target.is_floating_point() and target.dtype != input.dtype:
        wider = torch.promote_types(input.dtype, target.dtype)
        input, target = input.to(wider), target.to(wider)
    options = (options["ignore_index"], options["reduction"], options["label_smoothing"])
    return (_Metrics if metrics else _CrossEntropy).apply(input, target, weight, numbers, *options)


def linear_cross_entropy(
    input, linear_weight, target, linear_bias, weight, *, z_loss_weight, softcap, temperature, chunk_size, **options
):
    numbers = _tensor(z_loss_weight, softcap, temperature)
    options = (options["ignore_index"], options["reduction"], options["label_smoothing"])
    device = input.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        input, linear_weight = input.to(dtype), linear_weight.to(dtype)
        linear_bias = None if linear_bias is None else linear_bias.to(dtype)
    return _Linear.apply(input, linear_weight, linear_bias, target, weight, numbers, options, chunk_size)


def selective_log_softmax(input, index, temperature, softcap, entropy):
    return _Selective.apply(input, index, _tensor(0.0, softcap, temperature), entropy)
