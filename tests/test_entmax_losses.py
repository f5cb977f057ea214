"""The losses of sparsemax and entmax: limits, gradients of alpha and of distributions, and what other libraries got
wrong. What all operators share is in test_all_ops.py."""

import pytest
import torch
import torch.nn.functional as F
from conftest import reductions

import torch_softmax_ext as tse
from torch_softmax_ext.testing.entmax_losses import reference

close = torch.testing.assert_close
LOSSES = {"sparsemax_loss": (tse.sparsemax_loss, 2.0), "entmax15_loss": (tse.entmax15_loss, 1.5)}
losses = pytest.mark.parametrize(("loss", "alpha"), LOSSES.values(), ids=LOSSES)


def batch(device, dtype=torch.float64):
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(6, 9, generator=generator, dtype=torch.float64).to(device, dtype)
    return x.requires_grad_(), torch.tensor([0, 3, -100, 8, 2, 2], device=device)


@losses
@reductions
def test_entmax_loss_of_their_alpha_is_the_same(device, loss, alpha, reduction):
    x, t = batch(device)
    a, b = loss(x, t, reduction=reduction), tse.entmax_loss(x, t, alpha, reduction=reduction)
    close(a, b)
    close(torch.autograd.grad(a.sum(), x), torch.autograd.grad(b.sum(), x))


@reductions
def test_alpha_1_is_cross_entropy(device, reduction):
    x, t = batch(device)
    a, b = tse.entmax_loss(x, t, 1.0, reduction=reduction), F.cross_entropy(x, t, reduction=reduction)
    close(a, b)
    close(torch.autograd.grad(a.sum(), x), torch.autograd.grad(b.sum(), x))


@losses
def test_the_gradient_is_the_probabilities_less_the_target(device, loss, alpha):
    x, t = batch(device)
    (g,) = torch.autograd.grad(loss(x, t, reduction="sum"), x)
    p = tse.entmax(x.detach(), alpha)
    counted = (t >= 0)[:, None]
    close(g, (p - F.one_hot(t.clamp_min(0), 9)).where(counted, torch.zeros_like(p)))


@pytest.mark.parametrize("alpha", [1.25, 1.5, 2.0, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("n", [10, 5000])
def test_zero_at_the_margin_and_never_negative(device, alpha, dtype, n):
    """gokceneraslan/SparseMax.torch #2: negative losses."""

    def loss(x, t, reduction="none"):
        return tse.entmax_loss(x, t, alpha, reduction=reduction)

    margin = 1 / (alpha - 1)
    count = 64 if n == 10 else 8
    x = (torch.randn(count, n, device=device) / 8).clamp(-0.5, 0.5).to(dtype)
    t = torch.arange(count, device=device) % n
    rows = torch.arange(count, device=device)
    others = x.scatter(1, t[:, None], -float("inf")).amax(1)
    for above, is_zero in ((margin + 0.25, True), (margin, None), (margin - 0.03125, None), (margin - 0.25, False)):
        x[rows, t] = (others.double() + above).to(dtype)
        z = x.detach().requires_grad_()
        y = loss(z, t, reduction="none")
        assert (y >= 0).all()
        if is_zero is True:
            assert torch.equal(y, torch.zeros_like(y))
            assert torch.equal(torch.autograd.grad(y.sum(), z)[0], torch.zeros_like(z))
        if is_zero is False:
            assert (y > 0).all()


@pytest.mark.parametrize("alpha", [0.6, 1.0, 1.2, 1.5, 1.9])
@reductions
def test_gradient_of_alpha(device, alpha, reduction):
    x, t = batch(device)
    a = torch.full((6, 1), alpha, device=device, dtype=torch.float64, requires_grad=True)
    y = tse.entmax_loss(x, t, a, reduction=reduction)
    close(y, tse.entmax_loss(x, t, alpha, reduction=reduction))
    got = torch.autograd.grad(y.sum(), (x, a))
    close(got[0], torch.autograd.grad(tse.entmax_loss(x, t, alpha, reduction=reduction).sum(), x)[0])
    h = 1e-5
    with torch.no_grad():
        up, down = (tse.entmax_loss(x, t, a + s * h, reduction=reduction).sum() for s in (1, -1))
    close(got[1].sum(), (up - down) / (2 * h), rtol=1e-5, atol=1e-7)
    assert got[1][2] == 0  # ignored


@pytest.mark.not_on_host
@pytest.mark.parametrize("alpha", [1.0, 1.3, 1.5, 2.0])
def test_gradients_of_distributions(device, alpha):
    x, _ = batch(device)
    y = torch.rand(6, 9, device=device, dtype=torch.float64).softmax(1).requires_grad_()
    for reduction in ("none", "mean", "sum"):

        def ours(x, y, reduction=reduction):
            return tse.entmax_loss(x, y, alpha, reduction=reduction)

        close(ours(x, y), reference(x, y, alpha, reduction=reduction))
        assert torch.autograd.gradcheck(ours, (x, y))
    assert torch.autograd.gradgradcheck(ours, (x, y), atol=1e-4)


@pytest.mark.not_on_host
@pytest.mark.parametrize("of_classes", [True, False])
def test_gradcheck_of_alpha(device, of_classes):
    x, t = batch(device)
    y = t if of_classes else torch.rand(6, 9, device=device, dtype=torch.float64).softmax(1)
    a = torch.tensor([0.7, 1.0, 1.3, 1.5, 2.0, 2.5], device=device, dtype=torch.float64)[:, None].requires_grad_()

    def ours(x, a):
        return tse.entmax_loss(x, y, a, reduction="none")

    assert torch.autograd.gradcheck(ours, (x, a), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(ours, (x, a), atol=1e-4)


@losses
@pytest.mark.parametrize("n", [5, 300])
def test_single_logits_of_minus_inf(device, loss, alpha, n):
    """deep-spin/entmax #9: they made the loss NaN."""
    x, t = torch.randn(3, n, device=device), torch.tensor([0, 1, 2], device=device)
    padded = torch.cat([x, torch.full((3, 2), -torch.inf, device=device)], 1).requires_grad_()
    y = loss(padded, t, reduction="none")
    close(y, loss(x, t, reduction="none"))
    (g,) = torch.autograd.grad(y.sum(), padded)
    assert g.isfinite().all()
    assert (g[:, n:] == 0).all()


@losses
@pytest.mark.parametrize("n", [5, 300])
def test_a_row_of_minus_inf_has_no_loss(device, loss, alpha, n):
    """As in torch's cross_entropy: loss and gradient are NaN, unless the row is ignored."""
    x = torch.randn(3, n, device=device)
    x[:2] = -torch.inf
    x.requires_grad_()
    distribution = torch.full((3, n), 1 / n, device=device)
    for target, counts in ((torch.tensor([1, -100, 2], device=device), False), (distribution, True)):
        y = loss(x, target, reduction="none")
        assert y.isnan().tolist() == [True, counts, False]
        for create_graph in (False, True):
            (g,) = torch.autograd.grad(y.sum(), x, retain_graph=True, create_graph=create_graph)
            assert g[0].isnan().all()
            assert g[1].isnan().all() if counts else (g[1] == 0).all()
            assert g[2].isfinite().all()


@pytest.mark.not_on_host
def test_vmap_over_alphas_and_targets(device):
    x, t = batch(device)
    alphas = torch.tensor([1.2, 1.5, 1.8], device=device, dtype=torch.float64)
    for reduction in ("none", "mean", "sum"):

        def loss(a, reduction=reduction):
            return tse.entmax_loss(x.detach(), t, a, reduction=reduction)

        close(torch.func.vmap(loss)(alphas), torch.stack([loss(a) for a in alphas]))
    rows = torch.func.vmap(lambda x, t, a: tse.entmax_loss(x, t, a))(x.detach()[:3], t[:3], alphas)
    close(
        rows.nan_to_num(), torch.stack([tse.entmax_loss(x.detach()[i], t[i], alphas[i]) for i in range(3)]).nan_to_num()
    )


@losses
def test_gradients_of_other_grad_outputs_after_a_guess(device, loss, alpha):
    """Forward writes the gradient for the grad_output that came last; another one must not get it."""
    x, t = batch(device, torch.float32)
    (want,) = torch.autograd.grad(tse.entmax_loss(x.double(), t, alpha), x)
    for scale in (1.0, 1.0, 1.0, 3.0, 3.0, 3.0, -2.0, 1.0):
        (got,) = torch.autograd.grad(loss(x, t) * scale, x)
        close(got, want * scale)


@losses
@reductions
def test_no_classes_and_no_rows(device, loss, alpha, reduction):
    for shape in ((2, 0), (0, 5)):
        x, y = (torch.zeros(shape, device=device, requires_grad=True) for _ in range(2))
        gradients = torch.autograd.grad(loss(x, y, reduction=reduction).sum(), (x, y))
        assert [g.shape for g in gradients] == [shape, shape]
    none = torch.zeros(0, device=device, dtype=torch.long)
    x, a = torch.zeros(0, 5, device=device), torch.ones(0, 1, device=device)
    assert tse.entmax_loss(x, none, a, reduction="sum") == 0


@losses
def test_nan_in_a_distribution_is_seen(device, loss, alpha):
    y = torch.tensor([[float("nan"), 1, 0, 0], [0, 1, 0, 0]], device=device)
    x = torch.randn(2, 4, device=device, requires_grad=True)
    got = loss(x, y, reduction="none")
    assert got.isnan().tolist() == [True, False]
    (g,) = torch.autograd.grad(got.sum(), x)
    assert g.isnan().tolist() == [[True, False, False, False], [False] * 4]


@pytest.mark.parametrize("alpha", [1.3, 1.5, 2.0])
def test_gradients_where_a_distribution_is_0(device, alpha):
    x, t = batch(device)
    y = F.one_hot(t.clamp_min(0), 9).double().requires_grad_()
    first, second = (
        torch.autograd.grad(tse.entmax_loss(x, y, alpha, reduction="sum"), y, create_graph=c)[0] for c in (False, True)
    )
    close(first, second)


@pytest.mark.not_on_host
@pytest.mark.parametrize("gap", [80.0, 92.0, 100.0, 104.0])
def test_targets_of_tiny_probabilities(device, gap):
    x, t = torch.tensor([[0.0, -gap]], device=device), torch.ones(1, dtype=torch.long, device=device)
    close(tse.entmax_loss(x, t, 1.0).item(), gap)


@losses
def test_every_uint8_is_a_class(device, loss, alpha):
    x, t = torch.randn(2, 200, device=device), torch.tensor([156, 3], device=device)  # 156: -100 as a uint8
    close(loss(x, t.to(torch.uint8)), loss(x, t))


@losses
def test_a_loss_beyond_float32_is_infinite(device, loss, alpha):
    x = torch.tensor([[3e38, -3e38], [1.0, torch.finfo(torch.float32).min]], device=device)
    got = loss(x, torch.ones(2, dtype=torch.long, device=device), reduction="none")
    assert got[0] == float("inf")
    assert got[1] > 1e38
