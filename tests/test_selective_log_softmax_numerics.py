"""Accuracy of selective_log_softmax where rounding would cost the digits, in every layout: see numerics_cases.py."""

import pytest
import torch
from conftest import dtypes
from numerics_cases import (
    LARGE_LOGITS,
    LONG_ROWS,
    check_near_certainty,
    classes,
    equal_logits,
    layouts,
    log_odds,
    near_certain,
    nearly_equal,
    shapes,
)

import torch_softmax_ext as tse
from torch_softmax_ext.testing.selective_log_softmax import reference_with_entropy


@shapes
@dtypes
@log_odds
def test_log_probability_and_gradient_near_certainty(shape, dtype, log_odds, device):
    """The certain class is asked for alone, before others, after others, and twice."""
    x, target = near_certain(shape, dtype, log_odds, device)
    rows, other = x.movedim(1, -1), (target + 1) % x.shape[1]
    check_near_certainty(-tse.selective_log_softmax(rows, target), x, target)
    check_near_certainty(-tse.selective_log_softmax(rows, target, return_entropy=True)[0], x, target)
    for index, place in (([other, target], 1), ([target, target], 0), ([other, other, target, target], 2)):
        logp = tse.selective_log_softmax(rows, torch.stack(index, -1))
        check_near_certainty(-logp[..., place], x, target)
        assert torch.equal(logp[..., place], logp[..., -1])


def selected(device, x, index, layout, **options):
    """Log-probabilities, entropies, and the gradient of Σ log-probabilities, in float64 on the CPU."""
    z = (x if layout == "rows" else x.t().contiguous().t()).to(device).requires_grad_()
    logp, entropy = tse.selective_log_softmax(z, index.to(device), return_entropy=True, **options)
    alone = tse.selective_log_softmax(z, index.to(device), **options)
    (grad,) = torch.autograd.grad(alone.sum(), z)
    assert torch.equal(logp, alone)
    return logp.detach().cpu().double(), entropy.detach().cpu().double(), grad.cpu().double()


@layouts
@classes
@pytest.mark.parametrize("name", LARGE_LOGITS)
def test_large_logits(device, layout, classes, name):
    make, options = LARGE_LOGITS[name]
    x, index = make(classes), torch.tensor([[0, classes - 1], [classes - 1, 1]])
    logp, entropy, grad = selected(device, x, index, layout, **options)
    z = x.double().requires_grad_()
    want, want_entropy = reference_with_entropy(z, index, **options)
    (want_grad,) = torch.autograd.grad(want.sum(), z)
    torch.testing.assert_close(logp, want.detach().float().double(), rtol=3e-6, atol=0)
    torch.testing.assert_close(entropy, want_entropy.detach(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(grad, want_grad, rtol=1e-5, atol=1e-5 * float(want_grad.abs().amax()))


@layouts
@pytest.mark.parametrize("name", LONG_ROWS)
def test_long_rows(device, layout, name):
    x = LONG_ROWS[name]()
    index = torch.randint(x.shape[1] * 9 // 10, x.shape[1], x.shape[:1])
    logp, entropy, _ = selected(device, x, index, layout)
    want, want_entropy = reference_with_entropy(x.double(), index)
    torch.testing.assert_close(logp, want, rtol=2e-7, atol=0)
    torch.testing.assert_close(entropy, want_entropy, rtol=2e-7, atol=0)


@equal_logits
@pytest.mark.parametrize("value", [1.0, 0.7])
def test_log_sum_exp_of_equal_logits_is_within_four_ulp(shape, transposed, value, device):
    """Thousands of equal terms, so each addition would round in the same direction."""
    x, want, ulp = nearly_equal(shape, transposed, value, device)
    index = torch.zeros((*x.shape[:1], *x.shape[2:]), dtype=torch.long, device=device)
    logp = tse.selective_log_softmax(x.movedim(1, -1), index)
    assert (x[:, 0] - logp - want).abs().max() <= 4 * ulp


@layouts
def test_entropy_of_one_possible_class_is_zero(device, layout):
    x = torch.full((3, 500), float("-inf"))
    x[0, 7] = -1e12
    x[1] = torch.randn(500)
    x[1, 7] = 300
    x[2] = -1e30
    x[2, 7] = 5
    for index in (7, 8):
        logp, entropy, _ = selected(device, x, torch.full((3, 1), index), layout)
        assert (entropy == 0).all()
        assert (logp == 0).all() if index == 7 else (logp < -290).all()
