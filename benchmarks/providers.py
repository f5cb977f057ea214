"""Who is measured: for each operator the functions that do the same work, and the roofs of the machine."""

import functools

import torch
import torch.nn.functional as F


def providers(spec, options, functions=None):
    """{name: function(input, *args)}; "ours" first."""
    result = {"ours": functools.partial(spec.op, **options)}
    # Where torch has no such operator, or not with such options: a composition of torch's operators.
    has = spec.name == "cross_entropy" and not options.keys() & {"z_loss_weight", "softcap", "temperature"}
    result["eager"] = functools.partial(F.cross_entropy if has else spec.torch_op, **options)
    if functions is not None:
        result = dict(zip(("ours", "eager"), functions, strict=True))
    if spec.name == "selective_log_softmax":  # rounded to the dtype of the logits
        result["eager"] = lambda x, i: x.log_softmax(-1).gather(-1, i.unsqueeze(-1)).squeeze(-1)
    if spec.name == "linear_cross_entropy":  # its composition is what torch.compile gets, too: matrix products
        result["eager"] = lambda x, w, t: F.cross_entropy(F.linear(x, w), t)
        if hasattr(torch.nn, "LinearCrossEntropyOptions"):  # torch 2.14
            options = torch.nn.LinearCrossEntropyOptions()
            result["torch chunked"] = functools.partial(F.linear_cross_entropy, options=options)
        return result
    result["compile"] = torch.compile(result["eager"], fullgraph=True, dynamic=False)
    if spec.name == "sparsemax":
        try:
            import entmax
        except ImportError:
            return result
        dim = options.get("dim", -1)
        result["entmax"] = lambda x: entmax.sparsemax(x, dim=dim)
        result["entmax k=64"] = lambda x: entmax.sparsemax(x, dim=dim, k=64)
    return result


def roofs(x, args=()):
    """Where there is a linear layer, its three matrix products. Else: reading the input's bytes once, copying them into
    warm memory, and adding two such tensors into a third: the least that such reads and writes cost (in place they can
    cost less)."""
    if args and args[0].dim() == 2 and args[0].shape[1] == x.shape[1] and args[0].requires_grad:
        w = args[0].detach()

        def products():
            g = x @ w.t()
            return g @ w, g.t() @ x

        return {"products": products}
    a = x.reshape(-1).view(torch.int16 if x.element_size() == 2 else torch.int32)
    b, c = torch.empty_like(a), torch.empty_like(a)
    return {"read": lambda: a.max(), "copy": lambda: b.copy_(a), "add": lambda: torch.add(a, b, out=c)}


def engine(mode):
    """The least of torch's own that goes through its autograd engine: of 80 numbers x.sum().backward(), or, for
    `backward` alone, the gradient of -x."""
    leaf = torch.zeros(80, requires_grad=True)
    if mode == "backward":
        y, g = -leaf, torch.ones(80)
        return lambda: torch.autograd.grad(y, leaf, g, retain_graph=True)

    def run():
        leaf.sum().backward()
        leaf.grad = None

    return run


class Computed(torch.autograd.Function):
    """The same memory as a result of a computation, at no cost."""

    @staticmethod
    def forward(ctx, x):
        return x.detach()

    @staticmethod
    def backward(ctx, g):
        return g


def call(function, mode, x, args):
    """A call without arguments that does the work of `mode`."""
    if mode == "forward":

        def run():
            with torch.no_grad():
                return function(x, *args)

        return run
    leaf = x.detach().requires_grad_()
    if mode == "in place":  # the logits are overwritten with gradients, again and again: the same work
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
