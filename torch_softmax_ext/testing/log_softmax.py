"""Specification of log_softmax."""

import dataclasses

import torch

import torch_softmax_ext as tse
from torch_softmax_ext.testing.row_maps import reference, row_map_errors
from torch_softmax_ext.testing.softmax import shapes, softmax_samples
from torch_softmax_ext.testing.spec import OpSpec

_INF = float("inf")


def _core(s, dim):
    """torch's, but with a gradient of 0 where a logit is -inf."""
    y = torch.log_softmax(s, dim)
    return torch.where((s == -_INF) & ~y.isnan(), -_INF, y)


def _samples(device, dtype):
    """Without logits whose differences are larger than the dtype's largest number; masked results have no numerical
    derivative."""
    for s in softmax_samples(device, dtype):
        if s.name not in ("largest-differences", "largest-over-temperature", "large-finite-mask"):
            mask = s.kwargs.get("mask")
            yield dataclasses.replace(s, small=s.small and (mask is None or mask.is_floating_point()))


SPEC = OpSpec(
    name="log_softmax",
    op=tse.log_softmax,
    module=tse.LogSoftmax,
    reference=reference(_core, -_INF),
    torch_op=reference(_core, -_INF),
    samples=_samples,
    errors=tuple(row_map_errors(tse.log_softmax)),
    bench_shapes=shapes(tse.log_softmax, torch.log_softmax),
    bench_args=lambda x: (),
    bench_modes={"forward": "copy", "backward": "add"},
    bench_eager=lambda options: lambda x, dim=-1: torch.log_softmax(x, dim),
    rows=lambda x: (x[:1],),
    saves_output=True,
)
