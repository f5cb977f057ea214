"""Samples, references and errors that the specifications of sparsemax's and entmax's losses share."""

import functools

import torch

import torch_softmax_ext as tse
from torch_softmax_ext.testing import entmax as entmax_spec
from torch_softmax_ext.testing.spec import BenchShape, OpSpec, Peer, Random, Sample, error_case

_INF = float("inf")
_NONE = {"reduction": "none"}


def _entropy(p, alpha, dim):
    """Tsallis' entropy of order alpha."""
    if alpha == 1:
        return -torch.xlogy(p, p).sum(dim)
    power = torch.where(p > 0, torch.where(p > 0, p, 1).pow(alpha), 0)
    return (p.sum(dim) - power.sum(dim)) / (alpha * (alpha - 1))


def reference(input, target, alpha=1.5, *, ignore_index=-100, reduction="mean"):
    """By its definition, of probabilities that are differentiable themselves."""
    dim = min(1, input.dim() - 1)
    x = input
    if not target.is_floating_point():
        t = (target.reshape(()) if input.dim() == 1 else target).long()
        ignored = t == ignore_index
        x = torch.where(ignored.unsqueeze(dim), 0, x)
        safe = torch.where(ignored, 0, t)
        y = torch.nn.functional.one_hot(safe, x.shape[dim]).to(x.dtype) if x.shape[dim] else x
        y = y.movedim(-1, dim)
    else:
        ignored = torch.zeros_like(x.select(dim, 0), dtype=torch.bool)
        y = target.to(x.dtype)
    p = entmax_spec.SPEC.reference(x, alpha=alpha, dim=dim)
    z = x - x.amax(dim, keepdim=True) if x.numel() else x
    product = torch.where(p == y, 0, (p - y) * torch.where(p == y, 0, z)).sum(dim)
    rows = torch.where(ignored, 0, product + _entropy(p, alpha, dim) - _entropy(y, alpha, dim))
    if target.is_floating_point():  # of a sum that is 1 but for rounding, as cross-entropy is: Σ y (lse - x)
        largest = p.amax(dim)
        shift = -largest.log() if alpha == 1 else (1 - largest.pow(alpha - 1)) / (alpha - 1)
        rows = rows + shift * (y.sum(dim) - 1)
    if reduction == "none":
        return rows
    return rows.sum() if reduction == "sum" else rows.sum() / (~ignored).sum()


def _samples(alpha, device, dtype):
    r = Random(device, dtype, seed=7)
    x = functools.partial(r.normal, scale=2)
    for reduction in ("none", "mean", "sum"):
        o = {"reduction": reduction}
        yield Sample(f"2d-{reduction}", x(7, 10), (r.classes(10, 7),), o, small=True)
        yield Sample(f"ignored-{reduction}", x(6, 9), (r.classes(9, 6, ignored=2),), o, small=True)
        yield Sample(f"1d-{reduction}", x(5), (r.classes(5),), o, small=True)
        yield Sample(f"distributions-{reduction}", x(5, 8), (r.probabilities(5, 8),), o, small=True)
        yield Sample(f"images-{reduction}", x(2, 6, 3, 5), (r.classes(6, 2, 3, 5, ignored=3),), o, small=True)
        yield Sample(f"many-{reduction}", x(300, 40), (r.classes(40, 300, ignored=5),), o)
    yield Sample("1d-distribution", x(8), (r.probabilities(8),), small=True)
    yield Sample("1d-target-of-one", x(5), (r.classes(5, 1),), small=True)
    yield Sample("int32", x(7, 10), (r.classes(10, 7).int(),), small=True)
    yield Sample("uint8", x(7, 10), (r.classes(10, 7).to(torch.uint8),), {"ignore_index": 3}, small=True)
    yield Sample("one-class", x(4, 1), (r.classes(1, 4),), _NONE)
    yield Sample("no-rows-sum", x(0, 5), (r.classes(5, 0),), {"reduction": "sum"})
    yield Sample("no-rows-mean", x(0, 5), (r.classes(5, 0),), finite=False)
    yield Sample("all-ignored-mean", x(3, 5), (r.classes(5, 3, ignored=3),), finite=False)
    yield Sample("wide", x(3, 5000), (r.classes(5000, 3),), _NONE)
    yield Sample("wide-distributions", x(2, 5000), (r.probabilities(2, 5000),), _NONE)
    yield Sample("widest", x(2, 131072), (r.classes(131072, 2),))
    yield Sample("hundreds", x(6, 300), (r.classes(300, 6, ignored=2),))
    yield Sample("columns", x(5, 70, 40), (r.classes(70, 5, 40),))
    yield Sample("image-distributions", x(2, 9, 5, 7), (r.probabilities(2, 9, 5, 7, dim=1),))
    yield Sample("channels-last", x(2, 6, 3, 5).to(memory_format=torch.channels_last), (r.classes(6, 2, 3, 5),))
    yield Sample("transposed", x(12, 40).t(), (r.classes(12, 40),))
    yield Sample("expanded-rows", x(1, 33).expand(7, 33), (r.classes(33, 7),))
    yield Sample("misaligned", x(5 * 37 + 1)[1:].view(5, 37), (r.classes(37, 5),), _NONE)
    yield Sample("tied", torch.ones(4, 17, dtype=dtype, device=device), (r.classes(17, 4),), _NONE)
    yield Sample("offset", x(4, 100) + 100, (r.classes(100, 4),), _NONE)
    diagonal = torch.arange(6, device=device)
    peaky = x(6, 50)
    peaky[diagonal, diagonal] += 60
    yield Sample("peaky", peaky, (diagonal,), _NONE)
    holes = x(4, 40)
    holes[:, ::3] = -_INF
    yield Sample("minus-inf", holes, (torch.full((4,), 1, device=device),), _NONE)
    yield Sample("minus-inf-at-target", holes, (torch.full((4,), 3, device=device),), _NONE, finite=False)
    broken = x(4, 600)
    broken[0, 500], broken[2, 3] = float("nan"), _INF
    yield Sample("nan-inf", broken, (r.classes(600, 4),), _NONE, finite=False)
    ignored = broken.clone()
    yield Sample("ignored-nan", ignored, (torch.tensor([-100, 5, -100, 7], device=device),), _NONE)


def _errors(op):
    error = functools.partial(error_case, op)
    x, t = torch.zeros(2, 5), torch.tensor([0, 1])
    yield error("class", IndexError, r"target: .*\[0, 5\).* got 5 at row 1", x, torch.tensor([0, 5]), cpu_only=True)
    yield error("batch", ValueError, r"target: expected batch size 3", torch.zeros(3, 5), t)
    yield error("shape", RuntimeError, r"target: expected the shape", torch.zeros(2, 5, 4), t)
    yield error("scalar", RuntimeError, r"input: .* scalar", torch.zeros(()), torch.tensor(0))
    yield error("integer-logits", NotImplementedError, r"input: expected float32.* got Long", x.long(), t)
    yield error("int16-target", RuntimeError, r"target: expected int64, int32 or uint8.* got Short", x, t.short())
    yield error("distribution-shape", RuntimeError, r"target: expected .* of input's shape", x, torch.zeros(2, 4))
    yield error("ignore-index", RuntimeError, r"ignore_index: expected none .* got 1", x, x, ignore_index=1)
    yield error(
        "reduction", ValueError, r"reduction: expected 'none', 'mean' or 'sum', got 'avg'", x, t, reduction="avg"
    )
    yield error("no-target", TypeError, r"target: expected Tensor, got None", x, None)


_GOALS = (("forward+backward", "our cross_entropy", 1.5),)


def _peer(name, options):
    """The entmax package's loss, of the mean."""
    import entmax

    of_rows = getattr(entmax, {"entmax_loss": "entmax_bisect_loss"}.get(name, name))
    return lambda x, target: of_rows(x, target).mean()


def loss_spec(op, module, alpha, **fields):
    """The specification of one of the losses."""
    return OpSpec(
        name=op.__name__,
        op=op,
        module=module,
        reference=functools.partial(reference, alpha=alpha),
        torch_op=lambda x, *args, **options: reference(
            x.to(torch.promote_types(x.dtype, torch.float32)), *args, alpha=alpha, **options
        ),
        samples=functools.partial(_samples, alpha),
        errors=(*_errors(op), *fields.pop("errors", ())),
        rows=lambda x, target: (x[:1], target[:1]),
        row_options={"reduction": "none"},
        bench_shapes=(
            BenchShape((8, 10), goals=_GOALS),
            BenchShape((4096, 64), goals=_GOALS),
            BenchShape((4096, 1000), goals=_GOALS),
            BenchShape((1024, 32000), goals=_GOALS),
            BenchShape((1024, 32000), torch.bfloat16, goals=_GOALS),
        ),
        bench_args=lambda x: (torch.arange(x.shape[0], device=x.device) % x.shape[1],),
        bench_modes={"forward+backward": "copy"},
        bench_torch=(),
        bench_peers=(
            Peer("our cross_entropy", "torch_softmax_ext", lambda options: tse.cross_entropy),
            Peer("entmax", "entmax", functools.partial(_peer, op.__name__)),
        ),
        **fields,
    )
