"""Sums of long, flat, tied and confident rows in every layout, against float64: each failed on CUDA kernels once."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

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


def reference_cross_entropy(x, target):
    """Losses of float64 rows, and their gradients with all digits of that at the target."""
    at = target[:, None]
    own = x.gather(1, at)
    others = x.scatter(1, at, float("-inf")).logsumexp(1, keepdim=True) - own
    loss = torch.where(others < 0, others.exp().log1p(), others + (-others).exp().log1p())
    grad = (x - own - loss).exp().scatter(1, at, -torch.sigmoid(others))
    return loss[:, 0], grad


def certain(dtype, classes, probability):
    """Rows whose target has `probability`, or a little less or more; the others have it in different shares."""
    rows = 6
    x = torch.randn(rows, classes, dtype=torch.float64)
    target = torch.randint(0, classes, (rows,))
    others = x.scatter(1, target[:, None], float("-inf")).logsumexp(1)
    shift = torch.linspace(-1, 1, rows, dtype=torch.float64)
    x[torch.arange(rows), target] = others + torch.logit(torch.tensor(probability, dtype=torch.float64)) + shift
    return x.to(dtype), target


TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}
LAYOUTS = {
    "rows": (lambda x: x, lambda x: x),
    "columns": (lambda x: x.t()[None].contiguous(), lambda x: x[0].t()),  # an image's pixels
}


def loss_and_gradient(device, x, target, layout, **options):
    to, back = LAYOUTS[layout]
    image = layout == "columns"
    z = to(x).to(device).requires_grad_()
    t = (target[None] if image and not target.is_floating_point() else to(target) if image else target).to(device)
    loss = tse.cross_entropy(z, t, reduction="none", **options)
    (grad,) = torch.autograd.grad(loss.sum(), z)
    return loss.detach().cpu().double().reshape(-1), back(grad.cpu().double())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("classes", [2, 70, 1000, 3000, 20000])
@pytest.mark.parametrize("probability", [0.6, 0.99, 0.99999])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_cross_entropy_near_certainty(device, layout, classes, probability, dtype):
    x, target = certain(dtype, classes, probability)
    want_loss, want_grad = reference_cross_entropy(x.double(), target)
    loss, grad = loss_and_gradient(device, x, target, layout)
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(loss, want_loss, rtol=min(tolerance, 1e-5), atol=0)
    low = torch.finfo(dtype).tiny if dtype == torch.float16 else 0  # subnormal gradients have fewer digits
    torch.testing.assert_close(grad, want_grad, rtol=tolerance, atol=low * tolerance)


def test_cross_entropy_next_to_one(device):
    for dtype, gap in ((torch.float64, 37.43), (torch.float32, 80.0)):
        x = torch.tensor([[gap, 0]], dtype=dtype, device=device, requires_grad=True)
        loss = tse.cross_entropy(x, torch.tensor([0], device=device))
        loss.backward()
        want = torch.tensor(-gap, dtype=torch.float64).exp()
        torch.testing.assert_close(loss.detach().cpu().double(), want, rtol=1e-5, atol=0)
        torch.testing.assert_close(x.grad.cpu().double()[0], torch.stack([-want, want]), rtol=1e-5, atol=0)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_of_probabilities_near_certainty(device, layout, smoothing):
    x, target = certain(torch.float32, 300, 0.99999)
    q = torch.nn.functional.one_hot(target, 300).float()
    loss, grad = loss_and_gradient(device, x, q, layout, label_smoothing=smoothing)
    by_index = loss_and_gradient(device, x, target, layout, label_smoothing=smoothing)
    torch.testing.assert_close(loss, by_index[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(grad, by_index[1], rtol=1e-6, atol=0)
    if smoothing == 0:
        want_loss, want_grad = reference_cross_entropy(x.double(), target)
        torch.testing.assert_close(loss, want_loss, rtol=1e-5, atol=0)
        torch.testing.assert_close(grad, want_grad, rtol=1e-5, atol=0)
    certain_rows = 200 * q.double().float()
    loss, grad = loss_and_gradient(device, certain_rows, q, layout)
    assert (loss == 0).all()
    assert (grad == 0).all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_cross_entropy_of_probabilities_without_a_favourite(device, layout):
    x, q = 3 * torch.randn(4, 300), torch.rand(4, 300).softmax(1)
    loss, grad = loss_and_gradient(device, x, q, layout, label_smoothing=0.1)
    z = x.double().requires_grad_()
    want = torch.nn.functional.cross_entropy(z, q.double(), reduction="none", label_smoothing=0.1)
    (want_grad,) = torch.autograd.grad(want.sum(), z)
    torch.testing.assert_close(loss, want.detach(), rtol=2e-6, atol=0)
    torch.testing.assert_close(grad, want_grad, rtol=1e-5, atol=1e-8)


LARGE_ROWS = {
    "equal": lambda c: (torch.full((2, c), -1e12), {}),
    "close": lambda c: (3e11 + 1e5 * torch.randn(2, c), {}),
    "far-apart": lambda c: (1e38 * torch.randn(2, c).clamp(-3.4, 3.4), {}),
    "masked-first": lambda c: (torch.randn(2, c).masked_fill(torch.arange(c) < c * 2 // 3, -1e10), {}),
    "masked-last": lambda c: (torch.randn(2, c).masked_fill(torch.arange(c) >= c // 3, -1e30), {}),
    "wholly-masked": lambda c: (torch.full((2, c), -1e30), {}),
    "smoothed": lambda c: (1e11 * torch.randn(2, c), {"label_smoothing": 0.1}),
    "largest-smoothed": lambda c: (3.4e38 * torch.randn(2, c).sign(), {"label_smoothing": 1e-3}),
    "cold": lambda c: (60 + torch.randn(2, c), {"temperature": 1e-9}),
    "cold-and-capped": lambda c: (60 * torch.randn(2, c), {"temperature": 1e-9, "softcap": 30.0}),
    "z-loss": lambda c: (1e11 * torch.randn(2, c), {"z_loss_weight": 1e-20}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("classes", [3, 900, 9000])
@pytest.mark.parametrize("name", LARGE_ROWS)
def test_cross_entropy_of_large_logits(device, layout, classes, name):
    x, options = LARGE_ROWS[name](classes)
    target = torch.tensor([0, classes - 1])
    loss, grad = loss_and_gradient(device, x, target, layout, **options)
    z = x.double().requires_grad_()
    capped = options.get("softcap", 0)
    s = (capped * torch.tanh(z / capped) if capped else z) / options.get("temperature", 1)
    want = torch.nn.functional.cross_entropy(
        s, target, reduction="none", label_smoothing=options.get("label_smoothing", 0)
    )
    want = want + options.get("z_loss_weight", 0) * s.logsumexp(1).square()
    (want_grad,) = torch.autograd.grad(want.sum(), z)
    torch.testing.assert_close(loss, want.detach().float().double(), rtol=3e-6, atol=0)
    scale = want_grad.abs().amax()
    torch.testing.assert_close(grad, want_grad, rtol=1e-5, atol=1e-5 * float(scale))


LONG_COLUMNS = {
    "ones": lambda: torch.ones(2, 128256),
    "flat": lambda: 0.3 + 1e-3 * torch.randn(2, 128256),
    "million": lambda: torch.full((1, 10**6), 0.7),
    "masked-first": lambda: torch.randn(2, 128256).masked_fill(torch.arange(128256) < 100000, -1e10),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("name", LONG_COLUMNS)
def test_cross_entropy_of_long_rows(device, layout, smoothing, name):
    x = LONG_COLUMNS[name]()
    target = torch.randint(x.shape[1] * 9 // 10, x.shape[1], x.shape[:1])
    loss, grad = loss_and_gradient(device, x, target, layout, label_smoothing=smoothing)
    z = x.double().requires_grad_()
    want = torch.nn.functional.cross_entropy(z, target, reduction="none", label_smoothing=smoothing)
    (want_grad,) = torch.autograd.grad(want.sum(), z)
    torch.testing.assert_close(loss, want.detach(), rtol=2e-7, atol=0)
    torch.testing.assert_close(grad, want_grad, rtol=1e-6, atol=1e-12)


def selected(device, x, index, layout, weights=None, **options):
    """Log-probabilities, entropies, and the gradient of Σ weights · both."""
    z = (x if layout == "rows" else x.t().contiguous().t()).to(device).requires_grad_()
    logp, entropy = tse.selective_log_softmax(z, index.to(device), return_entropy=True, **options)
    alone = tse.selective_log_softmax(z, index.to(device), **options)
    (grad,) = torch.autograd.grad((alone * (1 if weights is None else weights.to(device))).sum(), z)
    assert torch.equal(logp, alone)
    return logp.detach().cpu().double(), entropy.detach().cpu().double(), grad.cpu().double()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("classes", [2, 70, 3000, 20000])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("place", [0, 2])
def test_selective_log_softmax_near_certainty(device, layout, classes, dtype, place):
    """The certain class is asked for first, or after others, and twice."""
    x, target = certain(dtype, classes, 0.99999)
    want_loss, want_grad = reference_cross_entropy(x.double(), target)
    tolerance = TOLERANCE[dtype]
    other = (target + 1) % classes
    index = torch.stack([target, target] if place == 0 else [other, other, target, target], 1)
    weights = torch.zeros(index.shape)
    weights[:, place] = 1
    logp, _, grad = selected(device, x, index, layout, weights)
    torch.testing.assert_close(-logp[:, place], want_loss, rtol=min(tolerance, 1e-5), atol=0)
    assert torch.equal(logp[:, place], logp[:, place + 1])
    low = torch.finfo(dtype).tiny if dtype == torch.float16 else 0
    torch.testing.assert_close(-grad, want_grad, rtol=tolerance, atol=low * tolerance)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("classes", [3, 900, 9000])
@pytest.mark.parametrize("name", [n for n in LARGE_ROWS if n not in ("smoothed", "largest-smoothed", "z-loss")])
def test_selective_log_softmax_of_large_logits(device, layout, classes, name):
    x, options = LARGE_ROWS[name](classes)
    index = torch.tensor([[0, classes - 1], [classes - 1, 1]])
    logp, entropy, grad = selected(device, x, index, layout, **options)
    z = x.double().requires_grad_()
    capped = options.get("softcap", 0)
    s = (capped * torch.tanh(z / capped) if capped else z) / options.get("temperature", 1)
    log_p = s.log_softmax(1)
    want = log_p.gather(1, index)
    (want_grad,) = torch.autograd.grad(want.sum(), z)
    torch.testing.assert_close(logp, want.detach().float().double(), rtol=3e-6, atol=0)
    torch.testing.assert_close(entropy, -(log_p.exp() * log_p).sum(1).detach(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(grad, want_grad, rtol=1e-5, atol=1e-5 * float(want_grad.abs().amax()))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", LONG_COLUMNS)
def test_selective_log_softmax_of_long_rows(device, layout, name):
    x = LONG_COLUMNS[name]()
    index = torch.randint(x.shape[1] * 9 // 10, x.shape[1], x.shape[:1])
    logp, entropy, _ = selected(device, x, index, layout)
    log_p = x.double().log_softmax(1)
    torch.testing.assert_close(logp, log_p.gather(1, index[:, None])[:, 0], rtol=2e-7, atol=0)
    torch.testing.assert_close(entropy, -(log_p.exp() * log_p).sum(1), rtol=2e-7, atol=0)


@pytest.mark.parametrize("layout", LAYOUTS)
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


@pytest.mark.on_host  # on a GPU a device-side assertion ends all work
@pytest.mark.parametrize("bad", [-1, 50, 2**40])
@pytest.mark.parametrize("classes_first", [False, True])
def test_backward_reads_no_class_that_is_none(bad, classes_first):
    ops = torch.ops.torch_softmax_ext
    x = torch.randn(50, 4).t() if classes_first else torch.randn(4, 50)
    good, target = torch.zeros(4, dtype=torch.long), torch.tensor([0, 1, bad, 2])
    options = (None, -100, "mean", 0.0, 0.0, None, 1.0)
    _, stats = ops._cross_entropy_forward(x, good, *options)
    with pytest.raises(RuntimeError, match="cross_entropy: target: expected a class index"):
        ops._cross_entropy_backward(torch.ones(()), None, x, target, stats, *options)
    _, _, stats = ops._selective_log_softmax_forward(x, good, False, 1.0, None)
    with pytest.raises(RuntimeError, match="selective_log_softmax: index: expected a class"):
        ops._selective_log_softmax_backward(torch.ones(4), None, x, target, stats, 1.0, None)


@pytest.mark.on_host
@pytest.mark.parametrize("shape", [(8, 10), (4000, 10), (8, 3000)])
def test_scratch_is_of_the_size_of_the_grid(shape):
    x, target = torch.randn(shape), torch.randint(0, shape[1], shape[:1])
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        tse.cross_entropy(x, target)
    allocated = [e.cpu_memory_usage for e in profiled.events() if e.name == "aten::empty"]
    statistics = 4 * 4 * shape[0] + 3 * 8
    assert sum(allocated) <= statistics + 16 * 4 * 32 + 200  # 32 bytes for each of 4 multiprocessors' 16 blocks
