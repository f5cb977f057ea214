"""Accuracy of cross_entropy where rounding would cost the digits, in every layout: see numerics_cases.py."""

from decimal import Decimal, localcontext

import pytest
import torch
from conftest import dtypes, for_cpu
from cross_entropy_cases import grad
from numerics_cases import (
    LARGE_LOGITS_OF_LOSSES,
    LONG_ROWS,
    check_near_certainty,
    classes,
    equal_logits,
    layouts,
    log_odds,
    near_certain,
    nearly_equal,
    reference,
    shapes,
)
from torch.nn import functional as F

import torch_softmax_ext as tse
from torch_softmax_ext.testing.cross_entropy import SPEC


def one_hot(x, target):
    return F.one_hot(target, x.shape[1]).movedim(-1, 1).to(x.dtype)


@shapes
@dtypes
@log_odds
def test_loss_and_gradient_near_certainty(shape, dtype, log_odds, device):
    x, target = near_certain(shape, dtype, log_odds, device)
    losses = {
        "none": tse.cross_entropy(x, target, reduction="none"),
        "gradient in forward": tse.cross_entropy(x, target, reduction="sum"),
        "metrics": tse.cross_entropy_with_metrics(x, target, reduction="none").loss,
        "probabilities": tse.cross_entropy(x, one_hot(x, target), reduction="none"),
        "in place": tse.cross_entropy(x * 1, target, reduction="none", inplace_backward=True),
    }
    for loss in losses.values():
        check_near_certainty(loss, x, target)


@dtypes
@pytest.mark.parametrize("gap", [37.43, 80.0])
def test_two_classes_far_apart(dtype, gap, device):
    """The probability rounds to 1 in every dtype."""
    x = torch.tensor([[gap, 0.0]], dtype=dtype, device=device, requires_grad=True)
    target = torch.zeros(1, dtype=torch.long, device=device)
    check_near_certainty(tse.cross_entropy(x, target, reduction="none"), x, target)


@shapes
@dtypes
def test_loss_and_gradient_are_zero_if_the_target_has_all_of_the_row(shape, dtype, device):
    x, target = near_certain(shape, dtype, 0.0, device)
    x = (x.detach() * 0).scatter_(1, target.unsqueeze(1), 3000.0).requires_grad_()
    for t in (target, one_hot(x, target)):
        loss = tse.cross_entropy(x, t, reduction="none")
        assert (loss == 0).all()
        assert (torch.autograd.grad(loss.sum(), x)[0] == 0).all()


def test_loss_of_probabilities_is_never_negative(device):
    for scale in (1.0, 30.0):
        x = torch.randn(300, 50, device=device) * scale
        assert (tse.cross_entropy(x, one_hot(x, x.argmax(1)), reduction="none") >= 0).all()


def loss_and_gradient(device, x, target, layout, **options):
    """Of rows, or of the pixels of an image; both results as rows in float64 on the CPU."""
    t = target.to(device)
    if layout == "rows":
        z = x.to(device).requires_grad_()
    else:
        z = x.t()[None].contiguous().to(device).requires_grad_()
        t = t.t()[None].contiguous() if t.is_floating_point() else t[None]
    loss = tse.cross_entropy(z, t, reduction="none", **options)
    (grad,) = torch.autograd.grad(loss.sum(), z)
    grad = grad if layout == "rows" else grad[0].t()
    return loss.detach().cpu().double().reshape(-1), grad.cpu().double()


def loss_and_gradient_of_reference(x, target, **options):
    z = x.double().requires_grad_()
    loss = SPEC.reference(z, target, reduction="none", **options)
    return loss.detach(), torch.autograd.grad(loss.sum(), z)[0]


@layouts
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_probabilities_near_certainty_are_as_exact_as_indices(device, layout, smoothing):
    x, target = (t.detach() for t in near_certain("rows of 1000", torch.float32, 11.5, "cpu"))
    q = one_hot(x, target)
    loss, grad = loss_and_gradient(device, x, q, layout, label_smoothing=smoothing)
    by_index = loss_and_gradient(device, x, target, layout, label_smoothing=smoothing)
    torch.testing.assert_close(loss, by_index[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(grad, by_index[1], rtol=1e-6, atol=0)
    if smoothing == 0:
        want_loss, want_grad = reference(x, target)
        torch.testing.assert_close(loss, want_loss, rtol=1e-5, atol=0)
        torch.testing.assert_close(grad, want_grad, rtol=1e-5, atol=0)


@layouts
def test_probabilities_without_a_favourite(device, layout):
    x, q = 3 * torch.randn(4, 300), torch.rand(4, 300).softmax(1)
    loss, grad = loss_and_gradient(device, x, q, layout, label_smoothing=0.1)
    want, want_grad = loss_and_gradient_of_reference(x, q.double(), label_smoothing=0.1)
    torch.testing.assert_close(loss, want, rtol=2e-6, atol=0)
    torch.testing.assert_close(grad, want_grad, rtol=1e-5, atol=1e-8)


@layouts
@classes
@pytest.mark.parametrize("name", LARGE_LOGITS_OF_LOSSES)
def test_large_logits(device, layout, classes, name):
    make, options = LARGE_LOGITS_OF_LOSSES[name]
    x, target = make(classes), torch.tensor([0, classes - 1])
    loss, grad = loss_and_gradient(device, x, target, layout, **options)
    want, want_grad = loss_and_gradient_of_reference(x, target, **options)
    torch.testing.assert_close(loss, want.float().double(), rtol=3e-6, atol=0)
    torch.testing.assert_close(grad, want_grad, rtol=1e-5, atol=1e-5 * float(want_grad.abs().amax()))


@layouts
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("name", LONG_ROWS)
def test_long_rows(device, layout, smoothing, name):
    x = LONG_ROWS[name]()
    target = torch.randint(x.shape[1] * 9 // 10, x.shape[1], x.shape[:1])
    loss, grad = loss_and_gradient(device, x, target, layout, label_smoothing=smoothing)
    want, want_grad = loss_and_gradient_of_reference(x, target, label_smoothing=smoothing)
    torch.testing.assert_close(loss, want, rtol=2e-7, atol=0)
    torch.testing.assert_close(grad, want_grad, rtol=1e-6, atol=1e-12)


@equal_logits
@pytest.mark.parametrize("value", [1.0, 0.7])
def test_log_sum_exp_of_equal_logits_is_within_four_ulp(shape, transposed, value, device):
    """Thousands of equal terms, so each addition would round in the same direction."""
    x, want, ulp = nearly_equal(shape, transposed, value, device)
    target = torch.zeros((*x.shape[:1], *x.shape[2:]), dtype=torch.long, device=device)
    lse = tse.cross_entropy(x, target, reduction="none") + x[:, 0]
    assert (lse.double() - want).abs().max() <= 4 * ulp


@pytest.mark.parametrize("shape", [(1, 2), (4, 1000), (2, 1000, 66), (5, 10), (3, 10, 70)], ids=str)
def test_weights_that_cancel(shape, device):
    """If the weights of the target distribution add up to 0, the softmax vanishes from the gradient."""
    n = shape[1]
    x = torch.randn(shape, device=device, requires_grad=True)
    target = torch.zeros((*shape[:1], *shape[2:]), dtype=torch.long, device=device)
    weight = torch.ones(n, device=device)
    weight[1] = 1 - n - n  # (1 - ε) w[0] + ε / n · Σ w = 0 for ε = 0.5
    options = {"label_smoothing": 0.5, "reduction": "sum"}

    def gradient(function, x, weight):
        (g,) = torch.autograd.grad(1e-16 * function(x, target, weight, **options), x)
        return g

    want = gradient(F.cross_entropy, x.detach().double().requires_grad_(), weight.double())
    torch.testing.assert_close(gradient(tse.cross_entropy, x, weight).double(), want, rtol=1e-4, atol=1e-22)


@pytest.mark.parametrize("offset", [0.0, 1e4, -1e12])
def test_gradient_of_class_probabilities_with_large_logits(offset, device):
    x = torch.randn(5, 30, device=device) + offset
    target = torch.randn(5, 30, device=device).softmax(1).requires_grad_()
    (got,) = torch.autograd.grad(tse.cross_entropy(x, target, reduction="sum"), target)
    torch.testing.assert_close(got, -x.double().log_softmax(1).float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("limit", [1.0, 10.0, 100.0])
def test_accuracy_of_float32(device, limit):
    """Loss within 4 units in the last place of the largest number that enters it; gradient to 1e-6 in norm."""
    x = (torch.rand(64, 32000, device=device) * 2 - 1) * limit
    target = torch.randint(0, 32000, (64,), device=device)
    loss, g = grad(tse.cross_entropy, x, target, reduction="none")
    want, want_g = grad(F.cross_entropy, x.double(), target, reduction="none")
    unit = 2.0**-23 * torch.logsumexp(x.double(), 1).abs().clamp_min(1)
    assert ((loss.double() - want).abs() <= 4 * unit).all()
    assert ((g.double() - want_g).norm(dim=1) <= 1e-6 * want_g.norm(dim=1)).all()


@pytest.mark.full_on_host
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("classes", [2, 5, 40])
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}, {"temperature": 0.7}], ids=str)
def test_each_loss_of_half_types_keeps_five_digits(dtype, classes, options, device):
    """What docs/numerics.md promises, over many rows: of certain predictions, too, whose loss is small."""
    for scale in (0.3, 3.0, 10.0):
        x = (torch.randn(20000, classes, dtype=torch.float64, device=device) * scale).to(dtype)
        target = torch.randint(classes, (20000,), device=device)
        target[::2] = x[::2].argmax(1)
        want = SPEC.reference(x.double(), target, reduction="none", **options)
        got = tse.cross_entropy(x, target, reduction="none", **options)
        assert ((got - want).abs() <= 6e-6 * want + 1e-13).all()  # what the reference rounds


@for_cpu
@pytest.mark.parametrize("scale", [0.1, 1, 10])
@pytest.mark.parametrize("columns", [False, True])
def test_accuracy_of_float64(scale, columns):
    """Against 40 digits, within the same 4 units."""
    x = torch.randn(100, 10, dtype=torch.float64) * scale
    x = x.t().contiguous().t() if columns else x
    target = x.argmax(1)
    loss = tse.cross_entropy(x, target, reduction="none").tolist()
    with localcontext() as context:
        context.prec = 40
        for row, t, got in zip(x.tolist(), target.tolist(), loss, strict=True):
            want = sum((Decimal(v) - Decimal(row[t])).exp() for v in row).ln()
            assert abs(Decimal(got) - want) <= 4 * Decimal(2) ** -52 * max(abs(want + Decimal(row[t])), 1)


@pytest.mark.parametrize("classes", [10, 300])
def test_loss_of_a_certain_prediction_is_zero_and_never_negative(device, classes):
    x = torch.zeros(4, classes, device=device)
    x[:, 3] = torch.tensor([20.0, 40.0, 200.0, 1e30], device=device)
    loss = tse.cross_entropy(x, torch.full((4,), 3, device=device), reduction="none")
    want = ((classes - 1) * torch.tensor([-20.0, -40.0], dtype=torch.float64, device=device).exp()).log1p()
    torch.testing.assert_close(loss[:2].double(), want, rtol=1e-5, atol=0)
    assert (loss[2:] == 0).all()
    many = torch.randn(20000, classes // 2, device=device) * 10
    assert (tse.cross_entropy(many, many.argmax(1), reduction="none") >= 0).all()
