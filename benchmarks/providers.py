"""The functions that are measured, all doing the same work, and the roofs of the machine."""

import contextlib
import functools

import torch


def providers(spec, shape, device="cpu"):
    """{name: function(input, *args)}: ours, eager, torch.compile of eager, then the installed peers."""
    eager = spec.bench_eager(shape.options) if spec.bench_eager else spec.torch_op
    ours, eager = shape.functions or (functools.partial(f, **shape.options) for f in (spec.op, eager))
    result = {"ours": ours}
    if "eager" in spec.bench_torch:
        result["eager"] = eager
    if "compile" in spec.bench_torch:
        result["compile"] = torch.compile(eager, fullgraph=True, dynamic=False)
    for peer in spec.bench_peers if shape.functions is None else ():
        with contextlib.suppress(Exception):  # a peer may fail to import for reasons of its own
            function = peer.make(shape.options) if device in peer.devices else None
            if function is not None:
                result[peer.name] = function
    return result


def roofs(spec, x, args=()):
    """Those of the spec. Otherwise reading the input's bytes once, copying them into warm memory, and adding two such
    tensors into a third."""
    if spec.bench_roofs:
        return spec.bench_roofs(x, *args)
    a = x.reshape(-1).view(torch.int16 if x.element_size() == 2 else torch.int32)
    b, c = torch.empty_like(a), torch.empty_like(a)
    return {"read": lambda: a.max(), "copy": lambda: b.copy_(a), "add": lambda: torch.add(a, b, out=c)}


def engine(mode):
    """torch's shortest backward pass: x.sum().backward() of 80 numbers; for `backward` alone, the gradient of -x."""
    leaf = torch.zeros(80, requires_grad=True)
    if mode == "backward":
        y, g = -leaf, torch.ones(80)
        return lambda: torch.autograd.grad(y, leaf, g, retain_graph=True)

    def run():
        leaf.sum().backward()
        leaf.grad = None

    return run
