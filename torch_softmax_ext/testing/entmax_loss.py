"""Specification of entmax_loss."""

import dataclasses
import functools

import torch

import torch_softmax_ext as tse
from torch_softmax_ext.testing.entmax_losses import loss_spec, reference
from torch_softmax_ext.testing.spec import Random, Sample, error_case

_BASE = loss_spec(tse.entmax_loss, tse.EntmaxLoss, 1.5)


def _samples(device, dtype):
    for s in _BASE.samples(device, dtype):
        yield dataclasses.replace(s, kwargs={**s.kwargs, "alpha": 1.3})
    r = Random(device, dtype, seed=9)
    for alpha in (0.5, 1.0, 1.01, 1.5, 1.9, 2.0):
        yield Sample(f"alpha-{alpha}", r.normal(5, 12), (r.classes(12, 5),), {"alpha": alpha, "reduction": "none"})
        yield Sample(f"distributions-{alpha}", r.normal(5, 12), (r.probabilities(5, 12),), {"alpha": alpha})


_X, _T = torch.zeros(2, 5), torch.tensor([0, 1])
_error = functools.partial(error_case, tse.entmax_loss)

SPEC = dataclasses.replace(
    _BASE,
    reference=reference,
    torch_op=lambda x, *args, **options: reference(x.to(torch.promote_types(x.dtype, torch.float32)), *args, **options),
    samples=_samples,
    errors=(
        *_BASE.errors,
        _error("alpha", ValueError, r"alpha: expected a positive number, got 0", _X, _T, 0.0),
        _error("alphas", RuntimeError, r"alpha: expected a number for each row", _X, _T, torch.ones(5)),
    ),
)
