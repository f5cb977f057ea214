"""The rows of the benchmark and the calls that do their work. Imports torch alone: benchmarks/compare.py."""

import math

import torch

LARGE = 1 << 22  # elements; smaller rows leave out accumulation and in place


def name_of(spec, shape, mode):
    words = [spec.name, "x".join(map(str, shape.shape)), str(shape.dtype)[6:]]
    words += [f"x{shape.scale}"] if shape.scale != 1 else []
    words += [shape.label] if shape.label else []
    return " ".join([*words, mode])


def rows_of(specs, pattern="", cuda=False):
    """(name, spec, shape, mode) of each row whose name contains the pattern."""
    for spec in specs:
        for shape in spec.bench_cuda_shapes if cuda else spec.bench_shapes:
            for mode in spec.bench_modes:
                if mode in ("accumulation", "in place") and math.prod(shape.shape) < LARGE:
                    continue
                if shape.modes is None or mode in shape.modes:
                    name = name_of(spec, shape, mode)
                    if pattern in name:
                        yield name, spec, shape, mode


def tensors_of(spec, shape):
    """The input of a row and its further arguments; the same values every time."""
    torch.manual_seed(0)
    x = (torch.randn(shape.shape) * shape.scale).to(shape.dtype)
    return x, (shape.args or spec.bench_args)(x)


class Computed(torch.autograd.Function):
    """Makes a leaf the result of a computation, at no cost: what inplace_backward asks for."""

    @staticmethod
    def forward(ctx, x):
        return x.detach()

    @staticmethod
    def backward(ctx, g):
        return g


def call(function, mode, x, args):
    """A function without arguments that does the work of `mode` once."""
    if mode == "forward":

        def run():
            with torch.no_grad():
                return function(x, *args)

        return run
    leaf = x.detach().requires_grad_()
    if mode == "in place":  # overwrites the logits with gradients; the next call does the same work on those
        leaf = x.clone().requires_grad_()

        def run():
            function(Computed.apply(leaf), *args, inplace_backward=True).backward()
            leaf.grad = None

        return run
    with torch.no_grad():
        g = torch.randn_like(function(leaf, *args))
    g = torch.ones_like(g) if g.dim() == 0 else g
    if mode == "accumulation":  # of four micro-batches
        g = g / 4
    if mode == "backward":
        y = function(leaf, *args)
        return lambda: torch.autograd.grad(y, leaf, g, retain_graph=True)

    def run():
        function(leaf, *args).backward(g)
        for t in (leaf, *args):
            t.grad = None

    return run
