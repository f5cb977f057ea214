"""Logits where rounding would cost the digits: nearly certain targets, huge or masked logits, long rows of ties.

For the tests of cross_entropy and of selective_log_softmax: (N, C) logits, or images (N, C, …), on the CPU.
"""

import math

import pytest
import torch

# shape, and the dimension that holds the classes in memory; tests see them in dimension 1
SHAPES = {
    **{f"rows of {n}": ((6, n), 1) for n in (2, 10, 70, 1000, 3000, 9001, 20000)},
    **{f"pixels of {n}": ((1, n, 6), 1) for n in (2, 70, 1000, 3000, 20000)},
    "image": ((2, 1000, 66), 1),
    "image of few classes": ((3, 10, 70), 1),
    "small image of few classes": ((2, 10, 7), 1),
    "columns": ((5000, 3), 0),
}
shapes = pytest.mark.parametrize("shape", SHAPES)
log_odds = pytest.mark.parametrize(
    "log_odds", [0.4, 11.5, *(pytest.param(v, marks=pytest.mark.full_on_host) for v in (4.6, 30.0))]
)
# Relative errors. Half types: their exp2 has an error of 3e-6, and gradients are rounded to the dtype.
LOSS = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 1e-5, torch.float16: 1e-5}
GRADIENT = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}
TARGET_GRADIENT = {**GRADIENT, torch.float16: 2.0**-11}


def near_certain(shape, dtype, log_odds, device):
    """Leaf logits whose targets are about exp(log_odds) times as probable as all other classes, and the targets."""
    shape, dim = SHAPES[shape]
    x = torch.randn(shape, dtype=torch.float64).movedim(dim, 1)
    target = torch.randint(0, x.shape[1], (*x.shape[:1], *x.shape[2:]))
    x.scatter_(1, target.unsqueeze(1), -math.inf)
    more_or_less = torch.linspace(-1, 1, target.numel(), dtype=torch.float64).view(target.shape).unsqueeze(1)
    x.scatter_(1, target.unsqueeze(1), x.logsumexp(1, keepdim=True) + log_odds + more_or_less)
    x = x.movedim(1, dim).to(dtype).to(device).contiguous().movedim(dim, 1)
    return x.requires_grad_(), target.to(device)


def reference(x, target):
    """Losses in float64, and gradients that keep all digits at the target."""
    x, at = x.detach().double(), target.unsqueeze(1)
    own = x.gather(1, at)
    others = x.scatter(1, at, -math.inf).logsumexp(1, keepdim=True) - own
    loss = torch.where(others < 0, others.exp().log1p(), others + (-others).exp().log1p())
    grad = (x - own - loss).exp().scatter(1, at, -torch.sigmoid(others))
    return loss.squeeze(1), grad


def check_near_certainty(loss, x, target):
    """The losses, or their sum, and the gradient of the leaf x."""
    want, want_grad = reference(x, target)
    torch.testing.assert_close(
        loss.detach().double(), want if loss.dim() > 0 else want.sum(), rtol=LOSS[x.dtype], atol=0
    )
    (grad,) = torch.autograd.grad(loss.sum(), x)
    subnormal = 2.0**-25 if x.dtype == torch.float16 else 0.0  # such gradients have fewer digits
    torch.testing.assert_close(grad.double(), want_grad, rtol=GRADIENT[x.dtype], atol=2 * subnormal)
    at = target.unsqueeze(1)
    grad, want_grad = grad.double().gather(1, at), want_grad.gather(1, at)
    torch.testing.assert_close(grad, want_grad, rtol=TARGET_GRADIENT[x.dtype], atol=subnormal)


# name: (logits of c classes, options)
LARGE_LOGITS = {
    "equal": (lambda c: torch.full((2, c), -1e12), {}),
    "close": (lambda c: 3e11 + 1e5 * torch.randn(2, c), {}),
    "far-apart": (lambda c: 1e38 * torch.randn(2, c).clamp(-3.4, 3.4), {}),
    "masked-first": (lambda c: torch.randn(2, c).masked_fill(torch.arange(c) < c * 2 // 3, -1e10), {}),
    "masked-last": (lambda c: torch.randn(2, c).masked_fill(torch.arange(c) >= c // 3, -1e30), {}),
    "wholly-masked": (lambda c: torch.full((2, c), -1e30), {}),
    "cold": (lambda c: 60 + torch.randn(2, c), {"temperature": 1e-9}),
    "cold-and-capped": (lambda c: 60 * torch.randn(2, c), {"temperature": 1e-9, "softcap": 30.0}),
}
LARGE_LOGITS_OF_LOSSES = {
    **LARGE_LOGITS,
    "smoothed": (lambda c: 1e11 * torch.randn(2, c), {"label_smoothing": 0.1}),
    "largest-smoothed": (lambda c: 3.4e38 * torch.randn(2, c).sign(), {"label_smoothing": 1e-3}),
    "z-loss": (lambda c: 1e11 * torch.randn(2, c), {"z_loss_weight": 1e-20}),
}
LONG_ROWS = {
    "ones": lambda: torch.ones(2, 128256),
    "flat": lambda: 0.3 + 1e-3 * torch.randn(2, 128256),
    "million": lambda: torch.full((1, 10**6), 0.7),
    "masked-first": lambda: torch.randn(2, 128256).masked_fill(torch.arange(128256) < 100000, -1e10),
}
classes = pytest.mark.parametrize("classes", [3, 900, 9000])
layouts = pytest.mark.parametrize("layout", ["rows", "columns"])
equal_logits = pytest.mark.parametrize(
    ("shape", "transposed"),
    [((2, 32000, 64), False), ((1, 128256, 16), False), ((2**18, 8), True), ((3, 2**18), False)],
)


def nearly_equal(shape, transposed, value, device):
    """Logits that equal `value` but for one 0.5 in each row; their log-sum-exp; one unit in its last place."""
    x = torch.full(shape, value, device=device)
    x = x.t() if transposed else x
    x[:, 1] = 0.5
    lse = math.log((x.shape[1] - 1) * math.exp(x[0, 0].flatten()[0].double()) + math.exp(0.5))
    return x, lse, 2.0 ** (math.floor(math.log2(lse)) - 23)
