"""Sums that are long and alike, and rows whose target is nearly certain: where rounding would take the digits."""

import math

import pytest
import torch
from conftest import dtypes
from torch.nn import functional as F

import torch_softmax_ext as tse

LAYOUTS = {  # name: (shape, class dimension)
    "row": ((4, 1000), 1),
    "long row": ((3, 9001), 1),
    "few": ((5, 10), 1),
    "image": ((2, 1000, 66), 1),
    "image of few": ((3, 10, 70), 1),
    "small image of few": ((2, 10, 7), 1),
    "columns": ((5000, 3), 0),
}
layouts = pytest.mark.parametrize("layout", LAYOUTS)
certainties = pytest.mark.parametrize("log_odds", [3.0, 11.5, 30.0])
# Of a relative error; half types round a loss in float32, which exp2 gives 3e-6, and a gradient to their own digits.
LOSS = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 1e-5, torch.float16: 1e-5}
GRADIENT = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def certain(layout, dtype, log_odds, device):
    """Logits (…, C) or of an image, whose targets have so many times the probability of all others, and the targets."""
    shape, dim = LAYOUTS[layout]
    x = torch.randn(shape, dtype=torch.float64).movedim(dim, 1)
    target = torch.randint(0, x.shape[1], (*x.shape[:1], *x.shape[2:]))
    x.scatter_(1, target.unsqueeze(1), -math.inf)
    x.scatter_(1, target.unsqueeze(1), x.logsumexp(1, keepdim=True) + log_odds)
    x = x.movedim(1, dim).to(dtype).to(device).contiguous().movedim(dim, 1)
    return x.requires_grad_(), target.to(device)


def expected(x, target):
    """Loss and gradient at the target, from the sum of the other classes' terms."""
    x = x.detach().double()
    others = x - x.gather(1, target.unsqueeze(1))
    others = others.scatter(1, target.unsqueeze(1), -math.inf).exp().sum(1)
    return others.log1p(), -others / (1 + others)


def assert_relative(got, want, tolerance):
    subnormal = 2.0**-25 if got.dtype == torch.float16 else 0.0
    off = (got.double() - want).abs() - tolerance * want.abs() - subnormal
    assert off.max() <= 0, (got.double() / want - 1).abs().max()


def check(loss, x, target, dtype):
    want, want_grad = expected(x, target)
    (g,) = torch.autograd.grad(loss.sum(), x)
    assert_relative(loss.detach(), want if loss.dim() > 0 else want.sum(), LOSS[dtype])
    assert_relative(g.gather(1, target.unsqueeze(1)).squeeze(1), want_grad, GRADIENT[dtype])


@layouts
@dtypes
@certainties
def test_cross_entropy_near_certainty(layout, dtype, log_odds, device):
    x, target = certain(layout, dtype, log_odds, device)
    check(tse.cross_entropy(x, target, reduction="none"), x, target, dtype)
    check(tse.cross_entropy(x, target, reduction="sum"), x, target, dtype)  # its gradient is made in forward
    check(tse.cross_entropy_with_metrics(x, target, reduction="none").loss, x, target, dtype)
    probabilities = F.one_hot(target, x.shape[1]).movedim(-1, 1).to(dtype)
    check(tse.cross_entropy(x, probabilities, reduction="none"), x, target, dtype)
    y = tse.cross_entropy(x * 1, target, reduction="none", inplace_backward=True)
    check(y, x, target, dtype)


@layouts
@dtypes
@certainties
def test_selective_log_softmax_near_certainty(layout, dtype, log_odds, device):
    x, target = certain(layout, dtype, log_odds, device)
    rows = x.movedim(1, -1)
    check(-tse.selective_log_softmax(rows, target), x, target, dtype)
    check(-tse.selective_log_softmax(rows, target, return_entropy=True)[0], x, target, dtype)
    several = torch.stack([(target + 1) % x.shape[1], target], -1)  # the certain one is not the first
    check(-tse.selective_log_softmax(rows, several)[..., 1], x, target, dtype)


@certainties
def test_linear_cross_entropy_near_certainty(log_odds, device):
    x, target = certain("row", torch.float32, log_odds, device)
    identity = torch.eye(x.shape[1], device=device)
    check(tse.linear_cross_entropy(x, identity, target, reduction="none"), x, target, torch.float32)


@dtypes
def test_two_classes_far_apart(dtype, device):
    """p rounds to 1 in every dtype."""
    x = torch.tensor([[37.43, 0.0]], dtype=dtype, device=device, requires_grad=True)
    target = torch.zeros(1, dtype=torch.long, device=device)
    check(tse.cross_entropy(x, target, reduction="none"), x, target, dtype)


@layouts
@dtypes
def test_a_class_with_all_of_the_target_and_of_the_row(layout, dtype, device):
    """Class probabilities, too: the loss is exactly 0."""
    x, target = certain(layout, dtype, 0.0, device)
    x = x.detach() * 0
    x.scatter_(1, target.unsqueeze(1), 3000.0)
    probabilities = F.one_hot(target, x.shape[1]).movedim(-1, 1).to(dtype)
    for t in (target, probabilities):
        assert (tse.cross_entropy(x, t, reduction="none") == 0).all()


def test_loss_of_probabilities_is_never_negative(device):
    for scale in (1.0, 30.0):
        x = torch.randn(300, 50, device=device) * scale
        target = F.one_hot(x.argmax(1), 50).to(x.dtype)
        assert (tse.cross_entropy(x, target, reduction="none") >= 0).all()


@pytest.mark.parametrize(
    ("shape", "transposed"),
    [((2, 32000, 64), False), ((1, 128256, 16), False), ((2**18, 8), True), ((3, 2**18), False)],
)
@pytest.mark.parametrize("value", [1.0, 0.7])
def test_log_sum_exp_of_equal_logits(shape, transposed, value, device):
    """Within 4 units in the last place: of thousands of equal terms, each addition rounds alike."""
    x = torch.full(shape, value, device=device)
    x = x.t() if transposed else x
    x[:, 1] = 0.5
    rows = (*x.shape[:1], *x.shape[2:])
    target = torch.zeros(rows, dtype=torch.long, device=device)
    want = math.log((x.shape[1] - 1) * math.exp(x[0, 0].flatten()[0].double()) + math.exp(0.5))
    ulp = 2.0 ** (math.floor(math.log2(want)) - 23)
    lse = tse.cross_entropy(x, target, reduction="none") + x[:, 0]
    assert (lse.double() - want).abs().max() <= 4 * ulp
    logp = tse.selective_log_softmax(x.movedim(1, -1), target)
    assert (x[:, 0] - logp - want).abs().max() <= 4 * ulp


@pytest.mark.parametrize("layout", ["row", "image", "few", "image of few"])
def test_weights_that_cancel(layout, device):
    """The softmax has no part in the gradient where the target's weights add up to 0."""
    shape, _ = LAYOUTS[layout]
    n = shape[1]
    x = torch.randn(shape, device=device, requires_grad=True)
    target = torch.zeros((*shape[:1], *shape[2:]), dtype=torch.long, device=device)
    weight = torch.ones(n, device=device)
    weight[1] = 1 - n - n  # (1 - s) w[0] + s / n · Σ w = 0 of s = 0.5
    options = {"label_smoothing": 0.5, "reduction": "sum"}

    def gradient(function, x, weight):
        (g,) = torch.autograd.grad(1e-16 * function(x, target, weight, **options), x)
        return g

    want = gradient(F.cross_entropy, x.detach().double().requires_grad_(), weight.double())
    torch.testing.assert_close(gradient(tse.cross_entropy, x, weight).double(), want, rtol=1e-4, atol=1e-22)


@pytest.mark.parametrize("offset", [0.0, 1e4, -1e12])
def test_gradient_of_probabilities_of_large_logits(offset, device):
    x = torch.randn(5, 30, device=device) + offset
    target = torch.randn(5, 30, device=device).softmax(1).requires_grad_()

    def gradient(x, target):
        return torch.autograd.grad(tse.cross_entropy(x, target, reduction="sum"), target)[0]

    torch.testing.assert_close(gradient(x, target), -x.double().log_softmax(1).float(), rtol=1e-5, atol=1e-5)
