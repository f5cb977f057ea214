"""Specification of softmax."""

import torch

import torch_softmax_ext as tse
from torch_softmax_ext.testing.row_maps import row_map_errors, row_map_samples
from torch_softmax_ext.testing.spec import BenchShape, OpSpec, Random, Sample

_INF = float("inf")


def _reference(input, dim=-1):
    masked = (input == -_INF).all(dim, keepdim=True) if input.numel() > 0 else torch.zeros_like(input, dtype=bool)
    return torch.where(masked, 0, torch.where(masked, 0, input).softmax(dim))


def _samples(device, dtype):
    yield from row_map_samples(device, dtype)
    logits = Random(device, dtype, seed=1).normal
    yield Sample("most-in-lanes", logits(3, 256))
    yield Sample("columns-in-lanes", logits(2, 256, 3), (1,))
    yield Sample("long", logits(2, 5000, scale=3.0))
    yield Sample("long-columns", logits(5000, 3), (0,))
    masked = logits(2, 9000)
    masked[:, :4096] = -3e4  # a first block far from the rest
    yield Sample("masked-block", masked)
    yield Sample("tied-of-200000", torch.ones(2, 200000, dtype=dtype, device=device))
    yield Sample("largest", torch.full((2, 300), torch.finfo(dtype).max, dtype=dtype, device=device))
    peaks = torch.full((2, 300), -torch.finfo(dtype).max, dtype=dtype, device=device)
    peaks[:, 7] = torch.finfo(dtype).max
    yield Sample("largest-differences", peaks)


SPEC = OpSpec(
    name="softmax",
    op=tse.softmax,
    module=tse.Softmax,
    reference=_reference,
    torch_op=_reference,
    samples=_samples,
    errors=tuple(row_map_errors(tse.softmax)),
    bench_shapes=(
        BenchShape((4096, 64)),
        BenchShape((1024, 1024)),
        BenchShape((256, 32000), torch.bfloat16),
        BenchShape((16, 512, 128), label="dim 1", options={"dim": 1}),
    ),
    bench_args=lambda x: (),
    bench_modes={"forward": "copy", "backward": "add"},
    bench_eager=lambda options: lambda x, dim=-1: torch.softmax(x, dim),
    rows=lambda x: (x[:1],),
    saves_output=True,
    has_kernels=False,
)
