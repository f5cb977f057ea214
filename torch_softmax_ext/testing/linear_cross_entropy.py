"""Specification of linear_cross_entropy."""

import functools

import torch
import torch.nn.functional as F

import torch_softmax_ext as tse
from torch_softmax_ext.testing.cross_entropy import SPEC as CROSS_ENTROPY
from torch_softmax_ext.testing.spec import BenchShape, OpSpec, Peer, Random, Sample, error_case


def _logits(input, linear_weight, linear_bias):
    linear_bias = linear_bias if linear_bias is None else linear_bias.to(input.dtype)
    return F.linear(
        input.flatten(0, -2) if input.dim() > 1 else input[None], linear_weight.to(input.dtype), linear_bias
    )


def _composed(loss, input, linear_weight, target, *, linear_bias=None, chunk_size=None, **kwargs):
    rows = target.reshape(-1, linear_weight.shape[0]) if target.is_floating_point() else target.reshape(-1)
    y = loss(_logits(input, linear_weight, linear_bias), rows, **kwargs)
    return y.reshape(input.shape[:-1]) if kwargs.get("reduction") == "none" else y


def _reference(*args, **kwargs):
    """A linear layer and cross_entropy's reference."""
    return _composed(CROSS_ENTROPY.reference, *args, **kwargs)


def _torch_op(*args, **kwargs):
    return _composed(CROSS_ENTROPY.torch_op, *args, **kwargs)


def _samples(device, dtype):
    r = Random(device, dtype)
    normal, target = r.normal, r.classes

    def weight(classes):
        return r.uniform(classes) + 0.5

    for reduction in ("none", "mean", "sum"):
        kwargs = {"reduction": reduction}
        yield Sample(f"2d-{reduction}", normal(7, 4), (normal(10, 4), target(10, 7)), kwargs, small=True)
        yield Sample(
            f"chunks-{reduction}",
            normal(7, 4),
            (normal(10, 4), target(10, 7, ignored=2)),
            {**kwargs, "linear_bias": normal(10), "chunk_size": 2},
            small=True,
        )
        yield Sample(
            f"all-options-{reduction}",
            normal(2, 3, 4),
            (normal(9, 4), target(9, 2, 3, ignored=2)),
            {
                **kwargs,
                "linear_bias": normal(9),
                "weight": weight(9),
                "label_smoothing": 0.2,
                "z_loss_weight": 0.1,
                "softcap": 5.0,
                "temperature": 0.7,
                "chunk_size": 3,
            },
            small=True,
        )
        yield Sample(
            f"wide-{reduction}", normal(600, 32), (normal(5003, 32, scale=0.3), target(5003, 600, ignored=9)), kwargs
        )
    yield Sample("1d", normal(4), (normal(9, 4), target(9)), small=True)
    yield Sample("int32", normal(5, 4), (normal(9, 4), target(9, 5).int()), small=True)
    yield Sample("uint8", normal(5, 4), (normal(9, 4), target(9, 5).to(torch.uint8)), {"ignore_index": 3}, small=True)
    for reduction in ("none", "mean", "sum"):
        kwargs = {"reduction": reduction}
        yield Sample(
            f"probabilities-{reduction}",
            normal(7, 4),
            (normal(9, 4), normal(7, 9).double().softmax(1).to(dtype)),
            {**kwargs, "linear_bias": normal(9), "weight": weight(9), "z_loss_weight": 0.1, "chunk_size": 3},
            small=True,
        )
    yield Sample("one-row-chunks", normal(5, 4), (normal(9, 4), target(9, 5)), {"chunk_size": 1})
    yield Sample("transposed", normal(4, 9).t(), (normal(4, 10).t(), target(10, 9)))
    yield Sample("every-other", normal(6, 10, 8)[:, ::2, ::2], (normal(10, 8)[:, ::2], target(10, 6, 5)))
    yield Sample("expanded", normal(1, 4).expand(6, 4), (normal(10, 4), target(10, 6)))
    yield Sample("no-rows-sum", normal(0, 4), (normal(5, 4), target(5, 0)), {"reduction": "sum"})
    yield Sample("no-rows-none", normal(0, 4), (normal(5, 4), target(5, 0)), {"reduction": "none"})
    yield Sample("no-rows-mean", normal(0, 4), (normal(5, 4), target(5, 0)), finite=False)
    yield Sample("all-ignored-sum", normal(3, 4), (normal(5, 4), target(5, 3, ignored=3)), {"reduction": "sum"})
    yield Sample("all-ignored-mean", normal(3, 4), (normal(5, 4), target(5, 3, ignored=3)), finite=False)


def _errors():
    error = functools.partial(error_case, tse.linear_cross_entropy)
    x, w, t = torch.zeros(3, 4), torch.zeros(5, 4), torch.tensor([0, 1, 2])
    yield error("class-too-large", IndexError, r"target: .*\[0, 5\).* got 5 at row 1", x, w, torch.tensor([0, 5, 1]))
    yield error("class-negative", IndexError, r"target: .* got -1 at row 2", x, w, torch.tensor([0, 1, -1]))
    yield error("rows", ValueError, r"target: expected the shape of input without", x, w, t[:2])
    yield error("scalar", RuntimeError, r"input: .* scalar", torch.zeros(()), w, t)
    yield error("integer-input", NotImplementedError, r"input: expected float32.* got Long", x.long(), w, t)
    yield error("int16-target", RuntimeError, r"target: expected int64, int32 or uint8.* got Short", x, w, t.short())
    yield error("target-device", RuntimeError, r"target: expected device .* got meta", x, w, t.to("meta"))
    match = r"linear_weight: expected shape \[5, 4\], got \[5, 6\]"
    yield error("features", RuntimeError, match, x, torch.zeros(5, 6), t)
    match = r"linear_weight: expected a strided tensor of Float, got Double"
    yield error("dtype", RuntimeError, match, x, w.double(), t)
    match = r"linear_bias: expected shape \[5\], got \[5, 1\]"
    yield error("bias-dim", RuntimeError, match, x, w, t, linear_bias=torch.zeros(5, 1))
    match = r"linear_bias: expected shape \[5\], got \[4\]"
    yield error("bias-size", RuntimeError, match, x, w, t, linear_bias=torch.zeros(4))
    match = r"weight: expected one weight for each of 5 .* \[4\]"
    yield error("weight-shape", RuntimeError, match, x, w, t, weight=torch.ones(4))
    match = r"target: expected class indices, or class probabilities \(…, 5\).* got Float of shape \[3, 4\]"
    yield error("probabilities-shape", RuntimeError, match, x, w, torch.zeros(3, 4))
    match = r"weight: expected floating point"
    yield error("weight-integer", RuntimeError, match, x, w, t, weight=torch.ones(5).long())
    yield error("smoothing", RuntimeError, r"label_smoothing: expected .* got 1.5", x, w, t, label_smoothing=1.5)
    yield error("temperature", ValueError, r"temperature: expected a positive number, got 0", x, w, t, temperature=0.0)
    yield error("softcap", ValueError, r"softcap: expected None or a positive number, got -1", x, w, t, softcap=-1.0)
    match = r"z_loss_weight: expected a finite number"
    yield error("z-loss", ValueError, match, x, w, t, z_loss_weight=float("inf"))
    match = r"chunk_size: expected None or a positive number .* got 0"
    yield error("chunk-size", ValueError, match, x, w, t, chunk_size=0)
    match = r"reduction: expected 'none', 'mean' or 'sum', got 'avg'"
    yield error("reduction", ValueError, match, x, w, t, reduction="avg")
    yield error("no-reduction", ValueError, r"reduction: expected .* got None", x, w, t, reduction=None)
    yield error("no-number", TypeError, r"temperature: expected float, got str", x, w, t, temperature="hot")
    yield error("no-chunk-size", TypeError, r"chunk_size: expected int or None, got float", x, w, t, chunk_size=1.5)
    yield error("no-tensor", TypeError, r"input: expected Tensor, got list", [1.0], w, t)
    yield error("no-bias", TypeError, r"linear_bias: expected Tensor or None, got int", x, w, t, linear_bias=1)


def _bench_args(x):
    return torch.randn(1000, x.shape[1]).to(x.dtype) / x.shape[1] ** 0.5, torch.randint(0, 1000, (x.shape[0],))


def _bench_args_of(classes):
    def args(x):
        weight = (torch.randn(classes, x.shape[1]) / x.shape[1] ** 0.5).to(x.dtype).requires_grad_()
        return weight, torch.randint(0, classes, x.shape[:1])

    return args


def _products(x, linear_weight, target):
    """The three matrix products: nearly all of the work."""
    w = linear_weight.detach()

    def run():
        g = x @ w.t()
        return g @ w, g.t() @ x

    return {"products": run}


def _chunked(options):
    """torch 2.14."""
    return functools.partial(F.linear_cross_entropy, options=torch.nn.LinearCrossEntropyOptions())


_LARGE = (("forward+backward", "faster", 1), ("forward+backward", "memory", 0.125))

SPEC = OpSpec(
    name="linear_cross_entropy",
    op=tse.linear_cross_entropy,
    module=tse.LinearCrossEntropyLoss,
    reference=_reference,
    torch_op=_torch_op,
    samples=_samples,
    errors=tuple(_errors()),
    bench_shapes=tuple(
        BenchShape(shape, dtype, label=f"{classes} classes", args=_bench_args_of(classes), **more)
        for shape, classes, dtype, more in (
            ((1024, 512), 8000, torch.float32, {}),
            ((1024, 512), 8000, torch.bfloat16, {}),
            ((4096, 1024), 32000, torch.float32, {"goals": _LARGE, "front": ("forward+backward",)}),
        )
    ),
    bench_args=_bench_args,
    bench_modes={"forward+backward": "products"},
    bench_eager=lambda options: lambda x, w, t: F.cross_entropy(F.linear(x, w), t),
    bench_torch=("eager",),
    bench_peers=(Peer("torch chunked", "torch", _chunked),),
    bench_roofs=_products,
    bench_bytes=lambda x, linear_weight, target: x.shape[0] * linear_weight.shape[0] * x.itemsize,
    rows=lambda x, linear_weight, target: (x[:1], linear_weight, target[:1]),
    row_options={"reduction": "none"},
    general_options={"label_smoothing": 0.1, "softcap": 5.0},
    batch_invariant=False,
    autocasts=True,
    has_kernels=False,
)
