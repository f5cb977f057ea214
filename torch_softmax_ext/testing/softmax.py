"""Specification of softmax."""

import functools

import torch

import torch_softmax_ext as tse
from torch_softmax_ext.testing.row_maps import reference, row_map_errors, row_map_samples
from torch_softmax_ext.testing.spec import BenchShape, OpSpec, Random, Sample

_INF = float("inf")
_reference = reference(torch.softmax)


def softmax_samples(device, dtype):
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


@functools.cache
def _causal(n):
    return torch.ones(n, n).tril().bool()


def shapes(ours, torchs):
    """Of softmax or log_softmax, beside torch's function."""

    def masked(x):
        return torchs(x.masked_fill(~_causal(x.shape[-1]), -_INF), -1)

    functions = (lambda x: ours(x, mask=_causal(x.shape[-1])), masked)
    return (*_SHAPES, BenchShape((8, 8, 512, 512), label="causal mask", functions=functions, goals=_MASKED))


_GOALS = (("forward", "roof", 1.5), ("forward", "faster", 1.0), ("backward", "faster", 1.0))
_MASKED = (("forward", "faster", 2.0),)
_SHORT = (("forward", "roof", 3.0), *_GOALS[1:])
_WIDE = (*_GOALS, ("backward", "roof", 1.5))
_SHAPES = (
    BenchShape((8, 10), goals=_GOALS[1:]),
    BenchShape((4096, 64), goals=_SHORT),
    BenchShape((4096, 64), torch.bfloat16, goals=_SHORT),
    BenchShape((4096, 512), goals=_GOALS),
    BenchShape((1024, 4096), torch.bfloat16, goals=_GOALS),
    BenchShape((256, 32000), goals=_WIDE),
    BenchShape((256, 32000), torch.bfloat16, goals=_WIDE),
    BenchShape((16, 131072), goals=_WIDE),
    BenchShape((512, 4096), label="dim 0", options={"dim": 0}, goals=_GOALS[1:]),
    BenchShape((8, 64, 64, 64), label="dim 1", options={"dim": 1}, goals=_GOALS[1:]),
)


SPEC = OpSpec(
    name="softmax",
    op=tse.softmax,
    module=tse.Softmax,
    reference=_reference,
    torch_op=_reference,
    samples=softmax_samples,
    errors=tuple(row_map_errors(tse.softmax)),
    bench_shapes=shapes(tse.softmax, torch.softmax),
    bench_args=lambda x: (),
    bench_modes={"forward": "copy", "backward": "add"},
    bench_eager=lambda options: lambda x, dim=-1: torch.softmax(x, dim),
    rows=lambda x: (x[:1],),
    saves_output=True,
)
