"""Specification of sparsemax."""

import torch

import torch_softmax_ext as tse
from torch_softmax_ext.testing.row_maps import prepared, reference, row_map_errors, row_map_samples
from torch_softmax_ext.testing.spec import BenchShape, OpSpec, Peer, Random, Sample

_INF = float("inf")


def _core(z, dim):
    """By sorting, as in the paper."""
    z = z.unsqueeze(0) if (is_scalar := z.dim() == 0) else z
    bad = z.isnan().any(dim, keepdim=True) | (z == _INF).any(dim, keepdim=True)
    z = z - z.amax(dim, keepdim=True).detach()  # only keeps the sums in range
    ordered = z.sort(dim=dim, descending=True).values
    shape = [-1 if d == dim % z.dim() else 1 for d in range(z.dim())]
    k = torch.arange(1, z.shape[dim] + 1, dtype=z.dtype, device=z.device).view(shape)
    sums = ordered.cumsum(dim)
    support = (1 + k * ordered > sums).sum(dim, keepdim=True)
    tau = (sums.gather(dim, (support - 1).clamp_min(0)) - 1) / support
    p = torch.where(bad, float("nan"), torch.where(z > tau, z - tau, torch.zeros_like(z)))
    return p.squeeze(0) if is_scalar else p


_reference = reference(_core)


def _differentiable(input, dim=-1, *, temperature=1.0, mask=None, dtype=None):
    """False in rows with an element exactly on the edge of the support, as often with half-precision logits."""
    s = prepared(input, dim, temperature, mask)
    if s.numel() == 0:
        return torch.ones_like(s, dtype=torch.bool)
    p = _reference(s, dim)
    tau = (s - p).where(p > 0, _INF).amin(dim, keepdim=True)
    return ((s - tau).abs() > 1e-6).all(dim, keepdim=True).expand_as(s)


def _samples(device, dtype):
    yield from row_map_samples(device, dtype)
    logits = Random(device, dtype, seed=1).normal
    yield Sample("wide", logits(3, 5000))
    yield Sample("widest", logits(2, 131072))
    yield Sample("wide-support", logits(2, 20000, scale=1e-4 if dtype == torch.float64 else 1e-2))
    yield Sample("many-rows", logits(3000, 16))
    yield Sample("columns", logits(3, 700, 40), (1,))
    yield Sample("peaky", logits(6, 50, scale=100.0))
    yield Sample("tied", torch.ones(4, 17, dtype=dtype, device=device))
    yield Sample("offset", logits(4, 100) + 100)
    yield Sample("flat", logits(5, 500, scale=1e-2))
    yield Sample("flat-blocks", logits(3, 3000, scale=1e-2))
    yield Sample("flat-long", logits(2, 5000, scale=1e-3))
    yield Sample("sorted-long", logits(2, 4999).sort().values)
    yield Sample("offset-long", logits(2, 5000, scale=1e-2) + 1e4)
    yield Sample("flat-columns", logits(4500, 3, scale=1e-3), (0,))
    dense = logits(2, 5000, scale=1e-3)
    dense[:, 1000:] -= 10
    yield Sample("dense-part", dense)
    yield Sample("flat-offset", logits(5, 700, scale=3e-3).sort().values + 1e4)
    spaced = logits(20, 320)
    spaced[:, ::32] += 3
    yield Sample("spaced-support", spaced)
    yield Sample("half-support", logits(20, 512, scale=0.05))
    for n in (512, 4096):
        window = torch.full((2, n), -_INF, dtype=dtype, device=device)
        window[:, 20:120] = logits(2, 100, scale=1e-3) - 2
        yield Sample(f"window-of-{n}", window)
    levels = torch.full((3, 1024), 0.1, dtype=torch.float64)
    levels[:, 512:] -= torch.tensor([[1.8], [1.9], [0.2]])
    yield Sample("two-levels", levels.to(dtype).to(device))
    for n in (100, 1100, 5000):
        yield Sample(f"lowest-{n}", torch.full((2, n), torch.finfo(dtype).min, dtype=dtype, device=device))
    largest = torch.zeros(2, 128, dtype=dtype, device=device)
    largest[:, ::32] = torch.finfo(dtype).max
    yield Sample("largest", largest)
    hidden = torch.full((2, 512), torch.finfo(dtype).max, dtype=dtype, device=device)
    hidden.view(2, 8, 64)[..., :16] *= -1  # a sample of the row may see nothing else
    yield Sample("largest-hidden", hidden)
    for bad in ("inf", "nan"):
        broken = logits(3, 5000, scale=0.001)
        broken[1, 0] = float(bad)
        yield Sample(f"flat-{bad}", broken, finite=False)
    yield Sample("expanded-inner", logits(2, 300, 1).expand(2, 300, 4), (1,))
    yield Sample("no-inner", logits(2, 5, 0), (1,))

    # Long, flat and tied rows along either dimension.
    flat = 1e-2 if dtype in (torch.float16, torch.bfloat16) else 1e-4
    yield Sample("flat-columns-of-20000", logits(20000, 2, scale=flat), (0,))
    yield Sample("flatter-columns-of-100000", logits(100000, 2, scale=flat / 10), (0,))
    yield Sample("tied-columns-of-100000", torch.ones(100000, 2, dtype=dtype, device=device), (0,))
    yield Sample("flat-of-200000", logits(2, 200000, scale=flat / 100))
    yield Sample("tied-of-200000", torch.ones(2, 200000, dtype=dtype, device=device))


def _bench_shapes():
    for scale in (1.0, 0.01):  # at 0.01 hundreds of elements are in the support
        for shape, limit in (((4096, 64), 4), ((1024, 512), 2), ((256, 8192), 2), ((64, 32000), 2), ((16, 131072), 2)):
            goals = (("forward", "roof", limit), ("backward", "roof", 1.5))
            front = {(1024, 512): ("forward",), (64, 32000): ("backward",)}.get(shape, ())
            if scale != 1:
                goals, front = (("forward", "σ = 1", 2),), ()
            yield BenchShape(shape, scale=scale, goals=goals, front=front)
    yield BenchShape((16, 512, 128), label="dim 1", options={"dim": 1})
    yield BenchShape((1, 128256))
    yield BenchShape((2, 1000000))


def _bench_cuda_shapes():
    shapes = ((1048576, 64), (131072, 512), (16384, 4096), (8192, 8192), (2048, 32000), (512, 131072))
    fronts = {(131072, 512): ("forward",), (2048, 32000): ("backward",)}
    for shape in shapes:
        yield BenchShape(shape, torch.bfloat16, front=fronts.get(shape, ()))
    for shape in shapes[2:]:
        yield BenchShape(shape)
    for shape in shapes[2:]:
        front = ("forward",) if shape == (16384, 4096) else ()
        yield BenchShape(shape, torch.bfloat16, scale=0.01, front=front)


def _entmax(**k):
    def make(options):
        import entmax

        return lambda x: entmax.sparsemax(x, dim=options.get("dim", -1), **k)

    return make


SPEC = OpSpec(
    name="sparsemax",
    op=tse.sparsemax,
    module=tse.Sparsemax,
    reference=_reference,
    torch_op=_reference,
    samples=_samples,
    errors=tuple(row_map_errors(tse.sparsemax)),
    bench_shapes=tuple(_bench_shapes()),
    bench_cuda_shapes=tuple(_bench_cuda_shapes()),
    bench_args=lambda x: (),
    bench_modes={"forward": "copy", "backward": "add"},
    bench_peers=(Peer("entmax", "entmax", _entmax()), Peer("entmax k=64", "entmax", _entmax(k=64))),
    bench_gates={"forward": 1.05},
    rows=lambda x: (x[:1],),
    saves_output=True,
    differentiable=_differentiable,
)
