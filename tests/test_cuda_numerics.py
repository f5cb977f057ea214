"""Sums of long, flat, tied and confident rows in every layout, against float64: each failed on CUDA kernels once."""

import pytest
import torch

import torch_softmax_ext as tse


def reference_sparsemax(x):
    """Of float64 rows."""
    z = x - x.amax(-1, keepdim=True)
    s = z.sort(-1, descending=True).values
    total = s.cumsum(-1)
    support = (1 + torch.arange(1, s.shape[-1] + 1, dtype=s.dtype) * s > total).sum(-1, keepdim=True)
    return (z - (total.gather(-1, support - 1) - 1) / support).clamp(min=0)


def ties_below_one(shape, noise):
    """One element and, four tenths of its probability below, all others: a step that overshoots leaves only the one."""
    x = torch.full(shape, -0.4321) + noise * torch.randn(shape)
    x[:, 7] = 0
    return x


LONG_ROWS = {
    "flat-20000": lambda: 1e-4 * torch.randn(2, 20000),
    "flat-50000": lambda: 1e-4 * torch.randn(2, 50000),
    "flat-100000": lambda: 1e-5 * torch.randn(2, 100000),
    "flat-2^20": lambda: 1e-6 * torch.randn(1, 2**20),
    "flat-2^22": lambda: 1e-7 * torch.randn(1, 2**22),
    "equal-50000": lambda: torch.ones(2, 50000),
    "ties-40000": lambda: ties_below_one((2, 40000), 0),
    "ties-2^20": lambda: ties_below_one((1, 2**20), 1e-6),
    "ties-2^22": lambda: ties_below_one((1, 2**22), 1e-6),
    "ties-at-the-edge": lambda: torch.cat([torch.zeros(2, 1), torch.full((2, 99999), -1 + 2.0**-23)], 1),
    "masked": lambda: (1e-4 * torch.randn(2, 50000)).masked_fill(torch.rand(2, 50000) < 0.9, float("-inf")),
}


@pytest.mark.parametrize("layout", ["rows", "columns"])
@pytest.mark.parametrize("name", LONG_ROWS)
def test_sparsemax_of_long_rows(device, name, layout):
    x = LONG_ROWS[name]()
    g = 3 + torch.randn_like(x)
    want = reference_sparsemax(x.double())
    dim = 1 if layout == "rows" else 0
    along = (lambda t: t) if layout == "rows" else (lambda t: t.t().contiguous())
    z = along(x).to(device).requires_grad_()
    y = tse.sparsemax(z, dim)
    (got_grad,) = torch.autograd.grad(y, z, along(g).to(device))
    got, got_grad = (t.detach().cpu().double().movedim(dim, -1) for t in (y, got_grad))
    assert ((got.sum(-1) - 1).abs() <= 1e-6).all()
    assert ((got - want).abs() <= 2e-7 * want.amax(-1, keepdim=True)).all()
    support = (got > 0).double()
    mean = (g.double() * support).sum(-1, keepdim=True) / support.sum(-1, keepdim=True)
    torch.testing.assert_close(got_grad, support * (g - mean), rtol=0, atol=1e-6)
