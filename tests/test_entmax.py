"""The alpha of entmax: its gradients, and torch.func over it."""

import pytest
import torch
from conftest import for_cpu

import torch_softmax_ext as tse
from torch_softmax_ext.testing.entmax import SPEC as ENTMAX

close = torch.testing.assert_close
ALPHAS = [0.5, 0.9999, 1.0, 1.00001, 1.2, 1.5, 1.9, 2.0, 2.5]


@pytest.mark.parametrize("alpha", ALPHAS)
def test_gradient_of_alpha(device, alpha):
    x = torch.randn(4, 9, device=device, dtype=torch.float64)
    a = torch.full((4, 1), alpha, device=device, dtype=torch.float64, requires_grad=True)
    y = tse.entmax(x, a)
    close(y, tse.entmax(x, alpha), rtol=1e-9, atol=1e-9)
    g = torch.randn_like(y)
    (got,) = torch.autograd.grad(y, a, g)
    h = 1e-5
    with torch.no_grad():
        want = ((tse.entmax(x, a + h) - tse.entmax(x, a - h)) * g).sum(1, keepdim=True) / (2 * h)
    close(got, want, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradient_of_alpha_in_other_dtypes(device, dtype):
    x = (torch.randn(5, 700, device=device) * 2).to(dtype)
    a = torch.tensor([0.7, 1.0, 1.01, 1.5, 1.8], device=device)[:, None].requires_grad_()
    y = tse.entmax(x, a)
    g = torch.randn_like(y)
    wide = a.detach().double().requires_grad_()
    (want,) = torch.autograd.grad(tse.entmax(x.double(), wide), wide, g.double())
    (got,) = torch.autograd.grad(y, a, g)
    assert (got.double() - want).abs().max() <= (1e-4 if dtype == torch.float32 else 0.05) * want.abs().max()


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_gradient_of_alphas_in_every_layout(device, dim):
    x = torch.randn(3, 40, 7, device=device, dtype=torch.float64).transpose(0, 2) * 3
    sizes = [s if d != dim % 3 else 1 for d, s in enumerate(x.shape)]
    a = (0.6 + 2 * torch.rand(sizes[1:], device=device, dtype=torch.float64)).requires_grad_()
    if dim == 0:
        a = a.detach()[:, :1].requires_grad_()  # broadcast over the rows
    g = torch.randn(7, 3, 40, device=device, dtype=torch.float64).transpose(1, 2)
    (want,) = torch.autograd.grad(ENTMAX.reference(x, dim, alpha=a), a, g)
    (got,) = torch.autograd.grad(tse.entmax(x, a, dim), a, g)
    close(got, want, rtol=1e-7, atol=1e-9)


def test_gradient_of_alpha_of_long_and_masked_rows(device):
    """One long row, which threads share; -inf and a gradient of infinity outside the support."""
    x = torch.randn(1, 100_003, device=device)
    x[:, ::3] = -float("inf")
    a = torch.tensor(1.3, device=device, requires_grad=True)
    y = tse.entmax(x, a)
    g = torch.randn_like(y).masked_fill(y == 0, float("inf"))
    (got,) = torch.autograd.grad(y, a, g)
    wide = a.detach().double().requires_grad_()
    (want,) = torch.autograd.grad(ENTMAX.reference(x.double(), alpha=wide), wide, g.double().masked_fill(y == 0, 0))
    close(got.double(), want, rtol=1e-4, atol=1e-6)


@pytest.mark.not_on_host
@pytest.mark.parametrize("alpha", [0.7, 1.0, 1.3, 1.5])
def test_gradcheck_of_alpha(device, alpha):
    x = torch.randn(2, 5, device=device, dtype=torch.float64, requires_grad=True)
    a = torch.full((2, 1), alpha, device=device, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(tse.entmax, (x, a))
    assert torch.autograd.gradgradcheck(tse.entmax, (x, a), atol=1e-4)
    assert torch.autograd.gradcheck(tse.entmax, (x, a), check_forward_ad=True, check_backward_ad=False)


@pytest.mark.not_on_host
def test_vmap_over_alphas(device):
    x, alphas = torch.randn(3, 4, 6, device=device), torch.tensor([1.2, 1.5, 1.8], device=device)
    want = torch.stack([tse.entmax(x[i], alphas[i]) for i in range(3)])
    close(torch.func.vmap(tse.entmax)(x, alphas), want)
    close(torch.func.vmap(lambda a: tse.entmax(x[0], a))(alphas)[0], want[0])


@for_cpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("n", [40, 900])
@pytest.mark.parametrize("function", ["entmax", "entmax_loss"])
def test_a_row_does_not_depend_on_the_alphas_of_others(dtype, n, function):
    """Rows with an alpha above 2 are computed in float64."""
    x, g, alphas = torch.randn(3, n).to(dtype), torch.randn(3, n).to(dtype), torch.tensor([[1.3], [2.5], [1.7]])
    t = torch.tensor([1, 2, 3])

    def results(rows):
        z, a = (v[rows].clone().requires_grad_() for v in (x, alphas))
        if function == "entmax":
            y, of_y = tse.entmax(z, a), g[rows]
        else:
            y, of_y = tse.entmax_loss(z, t[rows], a, reduction="none"), g[rows, 0].float()
        return y, *torch.autograd.grad(y, (z, a), of_y)

    together = results(slice(0, 3))
    for i in range(3):
        for a, b in zip(together, results(slice(i, i + 1)), strict=True):
            assert torch.equal(a[i : i + 1], b)
    for reduction in ("mean", "sum"):
        close(
            tse.entmax_loss(x, t, alphas, reduction=reduction),
            tse.entmax_loss(x.double(), t, alphas, reduction=reduction).float(),
        )
