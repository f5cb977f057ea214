"""Specification of entmax."""

import math

import torch

import torch_softmax_ext as tse
from torch_softmax_ext.testing.entmax15 import SHAPES, entmax_samples, peer
from torch_softmax_ext.testing.row_maps import by_keyword, in_float32, reference, row_map_errors
from torch_softmax_ext.testing.spec import OpSpec, Peer, Random, Sample, error_case

_INF = float("inf")


def _core(z, dim, alpha=1.5):
    """By bisection, as in the paper, and two of Newton's steps, which make value and derivatives exact."""
    c = torch.as_tensor(alpha, dtype=z.dtype, device=z.device) - 1
    is_softmax = c == 0
    c = torch.where(is_softmax, 1, c)
    bad = z.isnan().any(dim, keepdim=True) | (z == _INF).any(dim, keepdim=True)
    d = torch.where(bad, 0, z.amax(dim, keepdim=True).detach() - z)

    def power(s):
        """p at one s, where it is 0, and (alpha - 1) log p."""
        w = s + d
        outside = (d == _INF) | ((1 - c * w <= 0) & ~is_softmax)
        w = torch.where(outside, 0, w)
        log_u = torch.where(is_softmax, 0, torch.log1p(torch.where(is_softmax, 0, -c * w)))
        return torch.where(outside, 0, torch.exp(torch.where(is_softmax, -w, log_u / c))), outside, log_u

    with torch.no_grad():
        low = torch.zeros_like(d.amax(dim, keepdim=True))
        log_n = math.log(z.shape[dim] if z.dim() else 1)
        high = low + torch.where(is_softmax, log_n, -torch.expm1(-c * log_n) / c)
        for _ in range(45):
            s = (low + high) / 2
            is_low = power(s)[0].sum(dim, keepdim=True) > 1
            low, high = torch.where(is_low, s, low), torch.where(is_low, high, s)
    s = low
    for _ in range(3):
        p, outside, log_u = power(s)
        slope = torch.where(outside, 0, p / torch.exp(log_u))  # p^(2 - alpha)
        s = s + (p.sum(dim, keepdim=True) - 1) / slope.sum(dim, keepdim=True)
    return torch.where(bad, float("nan"), power(s)[0])


def _samples(device, dtype):
    yield from by_keyword(entmax_samples(device, dtype), alpha=1.3)
    random = Random(device, dtype, seed=5)
    logits = random.normal
    for alpha in (0.5, 1.0, 1.01, 1.25, 1.5, 1.8, 2.0):
        yield Sample(f"alpha-{alpha}", logits(5, 20), (), {"alpha": alpha}, small=alpha not in (1.0, 2.0))
        yield Sample(f"long-alpha-{alpha}", logits(3, 5000, scale=2.0), (), {"alpha": alpha})
    alphas = torch.tensor([0.7, 1.0, 1.1, 1.5, 1.9])
    yield Sample("alphas", logits(3, 5, 40), (), {"alpha": alphas.to(device, dtype)[:, None]})
    yield Sample("alphas-of-long-rows", logits(5, 700), (), {"alpha": alphas.to(device, dtype)[:, None]})
    yield Sample("alphas-of-columns", logits(700, 5), (), {"alpha": alphas.to(device, dtype), "dim": 0})
    for n in (300, 200000):
        yield Sample(f"tied-{n}", torch.ones(2, n, dtype=dtype, device=device), (), {"alpha": 1.9})
        yield Sample(f"tied-dense-{n}", torch.ones(2, n, dtype=dtype, device=device), (), {"alpha": 0.5})


_reference = reference(_core)

SPEC = OpSpec(
    name="entmax",
    op=tse.entmax,
    module=tse.Entmax,
    reference=_reference,
    torch_op=in_float32(_reference),
    samples=_samples,
    errors=(
        *row_map_errors(tse.entmax),
        error_case(
            tse.entmax, "alpha", ValueError, r"alpha: expected a positive number, got 0", torch.zeros(2, 3), 0.0
        ),
        error_case(
            tse.entmax,
            "alphas",
            RuntimeError,
            r"alpha: expected a number for each row",
            torch.zeros(2, 3),
            torch.ones(3),
        ),
    ),
    row_options={"alpha": 1.3},
    bench_shapes=SHAPES,
    bench_args=lambda x: (),
    bench_modes={"forward": "copy", "backward": "add"},
    bench_torch=(),
    bench_peers=(Peer("entmax bisect", "entmax", peer("entmax_bisect")),),
    rows=lambda x: (x[:1],),
    saves_output=True,
)
