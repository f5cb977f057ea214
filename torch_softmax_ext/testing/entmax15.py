"""Specification of entmax15."""

import torch

import torch_softmax_ext as tse
from torch_softmax_ext.testing.row_maps import in_float32, reference, row_map_errors, row_map_samples
from torch_softmax_ext.testing.spec import BenchShape, OpSpec, Peer, Random, Sample

_INF = float("inf")


def _core(z, dim):
    """By sorting, as in the paper."""
    z = z.unsqueeze(0) if (is_scalar := z.dim() == 0) else z
    bad = z.isnan().any(dim, keepdim=True) | (z == _INF).any(dim, keepdim=True)
    z = (z - z.amax(dim, keepdim=True).detach()) / 2
    ordered = z.sort(dim=dim, descending=True).values
    shape = [-1 if d == dim % z.dim() else 1 for d in range(z.dim())]
    k = torch.arange(1, z.shape[dim] + 1, dtype=z.dtype, device=z.device).view(shape)
    finite = ordered.clamp_min(-4)  # below -1 no element is in the support; keeps infinities out of the sums
    mean, mean_of_squares = finite.cumsum(dim) / k, finite.square().cumsum(dim) / k
    delta = (1 - k * (mean_of_squares - mean.square())) / k
    root = torch.where(delta > 0, delta, 1).sqrt()
    tau = mean - torch.where(delta > 0, root, 0)
    support = ((tau <= ordered) & (ordered > -1)).sum(dim, keepdim=True)
    tau = tau.gather(dim, (support - 1).clamp_min(0))
    p = torch.where(bad, float("nan"), torch.where(z > tau, z - tau, 0).square())
    return p.squeeze(0) if is_scalar else p


def entmax_samples(device, dtype):
    yield from row_map_samples(device, dtype)
    logits = Random(device, dtype, seed=1).normal
    yield Sample("wide", logits(3, 5000))
    yield Sample("widest", logits(2, 131072))
    # Of float16, the smallest probabilities would be subnormal, and the gradient is computed from them.
    yield Sample("wide-support", logits(2, 5000 if dtype == torch.float16 else 20000, scale=1e-3))
    yield Sample("many-rows", logits(1000, 16))
    yield Sample("columns", logits(3, 700, 40), (1,))
    yield Sample("peaky", logits(6, 50, scale=100.0))
    yield Sample("tied", torch.ones(4, 17, dtype=dtype, device=device))
    yield Sample("tied-of-200000", torch.ones(2, 200000, dtype=dtype, device=device))
    yield Sample("offset", logits(4, 100) + 100)
    yield Sample("flat", logits(5, 500, scale=1e-2))
    yield Sample("offset-long", logits(2, 5000, scale=1e-2) + 1e4)
    dense = logits(2, 5000, scale=1e-3)
    dense[:, 1000:] -= 10
    yield Sample("dense-part", dense)
    for n in (512, 4096):
        window = torch.full((2, n), -_INF, dtype=dtype, device=device)
        window[:, 20:120] = logits(2, 100, scale=1e-3) - 2
        yield Sample(f"window-of-{n}", window)
    for n in (100, 5000):
        yield Sample(f"lowest-{n}", torch.full((2, n), torch.finfo(dtype).min, dtype=dtype, device=device))
    largest = torch.zeros(2, 300, dtype=dtype, device=device)
    largest[:, ::32] = torch.finfo(dtype).max
    yield Sample("largest", largest)
    largest[:, 1::32] = -torch.finfo(dtype).max
    yield Sample("largest-differences", largest)


_GOALS = (("forward", "roof", 3.0),)
_WIDE = (*_GOALS, ("backward", "roof", 1.5))
SHAPES = (
    BenchShape((8, 10)),
    BenchShape((4096, 64)),
    BenchShape((4096, 512), goals=_GOALS),
    BenchShape((1024, 4096), torch.bfloat16, goals=_GOALS),
    BenchShape((256, 8192), goals=_WIDE),
    BenchShape((64, 32000), goals=_WIDE),
    BenchShape((16, 131072), goals=_WIDE),
    BenchShape((256, 8192), scale=0.01, goals=_WIDE),
    BenchShape((16, 512, 128), label="dim 1", options={"dim": 1}),
)


def peer(name, **fixed):
    """A function of the entmax package."""

    def make(options):
        import entmax

        return lambda x: getattr(entmax, name)(x, dim=options.get("dim", -1), **fixed)

    return make


_reference = reference(_core)

SPEC = OpSpec(
    name="entmax15",
    op=tse.entmax15,
    module=tse.Entmax15,
    reference=_reference,
    torch_op=in_float32(_reference),
    samples=entmax_samples,
    errors=tuple(row_map_errors(tse.entmax15)),
    bench_shapes=SHAPES,
    bench_args=lambda x: (),
    bench_modes={"forward": "copy", "backward": "add"},
    bench_peers=(
        Peer("entmax", "entmax", peer("entmax15")),
        Peer("entmax k=64", "entmax", peer("entmax15", k=64)),
    ),
    rows=lambda x: (x[:1],),
    saves_output=True,
)
