"""What only sparsemax promises: sums of one, long flat and tied rows, NaN within its own row, equal bits along any
dimension."""

import pytest
import torch
from conftest import dtypes, for_cpu, skip_without_memory

import torch_softmax_ext as tse
from torch_softmax_ext.testing.sparsemax import SPEC


@pytest.mark.parametrize("n", [5, 600, 5000])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_rows_that_are_not_finite_have_gradients_of_nan_and_leave_the_others_alone(device, n, bad):
    generator = torch.Generator().manual_seed(n)
    x, g = (torch.randn(4, n, generator=generator).to(device) for _ in range(2))
    broken = x.clone()
    broken[1, n - 1] = bad

    def gradient(x):
        x = x.requires_grad_()
        return torch.autograd.grad(tse.sparsemax(x), x, g)[0]

    want, got = gradient(x), gradient(broken)
    assert got[1].isnan().all()
    assert torch.equal(got[[0, 2, 3]], want[[0, 2, 3]])


@pytest.mark.parametrize("offset", [0, 1000])
@pytest.mark.parametrize("n", [2, 64, 500, 5000])
def test_probabilities_add_up_to_one_wherever_the_threshold_lies(device, n, offset):
    """One element has most of the mass. All others lie just above the threshold: its rounding error counts n times."""
    x = -0.9 + 0.1 / (n - 1) + 1e-5 * torch.randn(100, n, dtype=torch.float64)
    x[:, 0] = 0
    y = tse.sparsemax((x + offset).to(device, torch.float32))
    assert ((y > 0).sum(1) >= n // 2).all()
    assert ((y.double().sum(1) - 1).abs() <= 1e-6).all()


@for_cpu
@dtypes
@pytest.mark.parametrize("n", [3, 64, 300, 5000])
@pytest.mark.parametrize("inner", [2, 7, 131])
def test_the_same_bits_along_any_dimension(dtype, n, inner):
    """pytorch #14923 asks for sparsemax along any dimension."""
    x = torch.randn(2, n, inner, dtype=torch.float64).to(dtype).requires_grad_()
    g = torch.randn_like(x)
    rows = x.movedim(1, -1).contiguous()
    y, want = tse.sparsemax(x, 1), tse.sparsemax(rows, -1)
    assert torch.equal(y.movedim(1, -1), want)
    (got,) = torch.autograd.grad(y, x, g)
    (want,) = torch.autograd.grad(want, rows, g.movedim(1, -1).contiguous())
    assert torch.equal(got.movedim(1, -1), want)
    (got,) = torch.autograd.grad(tse.sparsemax(x, 1), x, g[..., :1].expand_as(x))  # is not copied
    (want,) = torch.autograd.grad(tse.sparsemax(rows, -1), rows, g[..., :1].expand_as(x).movedim(1, -1).contiguous())
    assert torch.equal(got.movedim(1, -1), want)


def ties_below_one(shape, noise):
    """One element, and all others 0.4321 below it: a search step that overshoots would leave only the one."""
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
def test_long_rows(device, name, layout):
    x = LONG_ROWS[name]()
    g = 3 + torch.randn_like(x)
    want = SPEC.reference(x.double())
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


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [33000, pytest.param(1, marks=pytest.mark.full)])  # one long row takes minutes
def test_more_than_two_to_the_31_elements(rows):
    n = 2**31 // rows + 1000
    skip_without_memory(rows * n, torch.bfloat16, copies=4)
    x = torch.zeros(rows, n, device="cuda", dtype=torch.bfloat16)
    x[-1, -1] = 30
    y = tse.sparsemax(x)
    assert y[-1, -1].item() == 1
    assert y[-1, : n - 1].any().item() is False
    if rows > 1:
        torch.testing.assert_close(y[0, 5].item(), 1 / n, rtol=1e-2, atol=0)
