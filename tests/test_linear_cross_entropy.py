"""What only linear_cross_entropy has: chunks, gradients of weight and bias, bounded memory."""

import pytest
import torch
import torch.nn.functional as F
from conftest import dtypes, reductions
from numerics_cases import check_near_certainty, log_odds, near_certain
from torch.utils.checkpoint import checkpoint

import torch_softmax_ext as tse
from torch_softmax_ext.testing.linear_cross_entropy import SPEC
from torch_softmax_ext.testing.memory import peak_memory

pytestmark = pytest.mark.not_on_host  # it has no kernels of its own
NAMES = ("loss", "input", "linear_weight", "linear_bias")


def problem(device, rows=60, features=24, classes=501, dtype=torch.float32, ignored=True, options=False):
    """input, linear_weight, linear_bias, target, and a dictionary of options."""

    def normal(*shape):
        return torch.randn(shape, dtype=torch.float64).to(device, dtype)

    target = torch.randint(0, classes, (rows,), device=device)
    if ignored:
        target[1::7] = -100
    o = {}
    if options:
        o = {"label_smoothing": 0.1, "z_loss_weight": 0.05, "softcap": 8.0, "temperature": 0.8}
        o["weight"] = torch.rand(classes, device=device) + 0.5
    return normal(rows, features), normal(classes, features) * 0.4, normal(classes), target, o


def gradients(function, x, w, b, target, g=None, **options):
    """The loss and the gradients of input, weight and bias."""
    leaves = [t.detach().requires_grad_() for t in (x, w, b)]
    loss = function(leaves[0], leaves[1], target, linear_bias=leaves[2], **options)
    g = torch.ones_like(loss) if g is None else g.to(loss.dtype)
    return loss.detach(), *torch.autograd.grad(loss, leaves, g)


def assert_close(got, want, tolerance):
    for a, b, name in zip(got, want, NAMES, strict=True):
        error, norm = (a.double() - b.double()).norm().item(), b.double().norm().item()
        assert error <= tolerance * norm, (name, error, norm)


@dtypes
@reductions
@pytest.mark.parametrize("chunk_size", [None, 1, 7, 1000])
@pytest.mark.parametrize("ignored", [True, False], ids=["ignored", "all-counted"])
@pytest.mark.parametrize("options", [True, False], ids=["all-options", "plain"])
def test_all_gradients(device, dtype, reduction, chunk_size, ignored, options):
    x, w, b, target, o = problem(device, dtype=dtype, ignored=ignored, options=options)
    g = torch.randn((), dtype=torch.float64, device=device) if reduction != "none" else torch.randn(60, device=device)
    got = gradients(tse.linear_cross_entropy, x, w, b, target, g, reduction=reduction, chunk_size=chunk_size, **o)
    want = gradients(SPEC.reference, x.double(), w.double(), b.double(), target, g, reduction=reduction, **o)
    assert [t.dtype for t in got[1:]] == [dtype] * 3
    assert got[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    tolerance = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 3e-2, torch.float16: 3e-3}[dtype]
    assert_close(got, want, tolerance)
    assert (got[1][target == -100] == 0).all()


def test_each_option_alone(device):
    x, w, b, target, options = problem(device, dtype=torch.float64, options=True)
    for name, value in {**options, "ignore_index": int(target[0])}.items():
        for reduction in ("none", "mean", "sum"):
            o = {name: value, "reduction": reduction}
            t = target.clamp_min(0) if name == "ignore_index" else target
            assert_close(
                gradients(tse.linear_cross_entropy, x, w, b, t, chunk_size=16, **o),
                gradients(SPEC.reference, x, w, b, t, **o),
                1e-12,
            )


def test_several_blocks_of_classes(device):
    """Half types convert the weights one block of classes at a time."""
    for dtype, tolerance in ((torch.bfloat16, 2e-2), (torch.float16, 2e-3)):
        x, w, b, target, _ = problem(device, classes=9001, dtype=dtype)
        got = gradients(tse.linear_cross_entropy, x, w, b, target, chunk_size=17)
        assert_close(got, gradients(SPEC.reference, x.double(), w.double(), b.double(), target), tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_many_chunks_are_added_up_in_float32(device, dtype):
    """With one row per chunk, a sum in the half type would stop growing."""
    x, w, b, _, _ = problem(device, rows=1200, classes=3, features=4, dtype=dtype, ignored=False)
    x, target = x[:1].expand(1200, 4), torch.zeros(1200, dtype=torch.long, device=device)
    got = gradients(tse.linear_cross_entropy, x, w, b, target, reduction="sum", chunk_size=1)
    want = gradients(SPEC.reference, x.double(), w.double(), b.double(), target, reduction="sum")
    assert_close(got, want, 2e-2)


def test_float16_under_a_loss_scale_loses_nothing_to_underflow(device):
    x, w, b, target, _ = problem(device, rows=500, classes=3000, dtype=torch.float16)
    x, w = x * 2.0**-10, w * 2.0**-10  # makes the gradients small, too
    scale = torch.tensor(2.0**14, device=device)
    got = gradients(tse.linear_cross_entropy, x, w, b, target, scale)
    want = gradients(SPEC.reference, x.double(), w.double(), b.double(), target, scale)
    assert_close(got, want, 2e-3)


@reductions
@pytest.mark.parametrize("mode", ["all-ignored", "no-rows"])
def test_nothing_counted(device, reduction, mode):
    x, w, b, target, _ = problem(device)
    target = torch.full_like(target, -100)
    if mode == "no-rows":
        x, target = x[:0], target[:0]
    got = gradients(tse.linear_cross_entropy, x, w, b, target, reduction=reduction)
    want = gradients(SPEC.reference, x, w, b, target, reduction=reduction)
    torch.testing.assert_close(got, want, equal_nan=True)
    assert all((g == 0).all() for g in got[1:])


@reductions
@pytest.mark.parametrize("asked", [(0,), (1,), (2,), (0, 2), (1, 2)], ids=str)
def test_only_gradients_that_are_asked_for_are_computed(device, reduction, asked):
    x, w, b, target, _ = problem(device, ignored=False)
    want = gradients(tse.linear_cross_entropy, x, w, b, target, reduction=reduction)[1:]
    leaves = [t.detach().requires_grad_(i in asked) for i, t in enumerate((x, w, b))]
    with torch.profiler.profile() as trace:
        loss = tse.linear_cross_entropy(
            leaves[0], leaves[1], target, linear_bias=leaves[2], reduction=reduction, chunk_size=60
        )
        loss.sum().backward()
    for i, leaf in enumerate(leaves):
        assert (leaf.grad is not None) == (i in asked)
        if i in asked:
            torch.testing.assert_close(leaf.grad, want[i])
    products = sum(e.count for e in trace.key_averages() if e.key in ("aten::mm", "aten::addmm"))
    assert products == (2 if reduction == "none" else 1) + (0 in asked) + (1 in asked)


@pytest.mark.parametrize("with_bias", [True, False])
def test_gradcheck(device, with_bias):
    x, w, b, target, options = problem(device, 5, 3, 7, torch.float64, options=True)
    leaves = [t.requires_grad_() for t in ((x, w, b) if with_bias else (x, w))]
    for reduction in ("none", "mean", "sum"):

        def function(x, w, b=None, reduction=reduction):
            return tse.linear_cross_entropy(x, w, target, linear_bias=b, reduction=reduction, chunk_size=2, **options)

        assert torch.autograd.gradcheck(function, leaves, check_batched_grad=True)
        assert torch.autograd.gradgradcheck(function, leaves, check_batched_grad=True)
        assert torch.autograd.gradcheck(function, leaves, check_forward_ad=True)


@reductions
def test_func_transforms_of_all_tensors(device, reduction):
    x, w, b, target, options = problem(device, 6, 3, 7, torch.float64, options=True)

    def call(function, *tensors):
        x, w, b = tensors
        return function(x, w, target, linear_bias=b, reduction=reduction, **options).square().sum()

    def ours(*tensors):
        return call(tse.linear_cross_entropy, *tensors)

    def reference(*tensors):
        return call(SPEC.reference, *tensors)

    close, f = torch.testing.assert_close, torch.func
    close(f.grad(ours, (0, 1, 2))(x, w, b), f.grad(reference, (0, 1, 2))(x, w, b))
    close(f.jvp(ours, (x, w, b), (x, w, b)), f.jvp(reference, (x, w, b), (x, w, b)))
    batch = [torch.stack([t, 2 * t]) for t in (x, w, b)]
    want = torch.stack([reference(*(t[i] for t in batch)) for i in range(2)])
    close(f.vmap(ours)(*batch), want)
    close(f.vmap(ours, (None, 0, None))(x, batch[1], b), torch.stack([reference(x, k * w, b) for k in (1, 2)]))


def test_backward_scales_by_grad_output(device):
    x, w, b, target, _ = problem(device)
    for factor in (1.0, 0.25, 0.0):  # powers of two keep the bits
        want = gradients(tse.linear_cross_entropy, x, w, b, target)[1:]
        got = gradients(tse.linear_cross_entropy, x, w, b, target, torch.tensor(factor, device=device))[1:]
        assert all(torch.equal(a, factor * b) for a, b in zip(got, want, strict=True))


def test_expanded_grad_output(device):
    x, w, b, target, _ = problem(device)
    want = gradients(tse.linear_cross_entropy, x, w, b, target, reduction="sum")
    for g in (torch.ones((), device=device).expand(60), torch.ones(60, 2, device=device)[:, 1]):
        got = gradients(tse.linear_cross_entropy, x, w, b, target, g, reduction="none")
        torch.testing.assert_close(got[1:], want[1:])


def test_a_gradient_that_was_handed_out_may_be_changed(device):
    x, w, b, target, _ = problem(device)
    leaves = [t.requires_grad_() for t in (x, w, b)]
    loss = tse.linear_cross_entropy(x, w, target, linear_bias=b)
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    want = [g.clone() for g in first]
    for g in first:
        g.zero_()
    assert all(torch.equal(a, b) for a, b in zip(torch.autograd.grad(loss, leaves), want, strict=True))


@reductions
def test_the_same_bits_again_and_without_gradients(device, reduction):
    x, w, b, target, o = problem(device, options=True)
    o |= {"reduction": reduction, "chunk_size": 16}
    first, second = (gradients(tse.linear_cross_entropy, x, w, b, target, **o) for _ in range(2))
    assert all(torch.equal(p, q) for p, q in zip(first, second, strict=True))
    assert torch.equal(tse.linear_cross_entropy(x, w, target, linear_bias=b, **o), first[0])


def test_inputs_of_any_strides(device):
    x, w, b, target, _ = problem(device)
    want = gradients(tse.linear_cross_entropy, x, w, b, target)
    other = x.t().contiguous().t(), w.t().contiguous().t(), b.repeat_interleave(2)[::2]
    assert_close(gradients(tse.linear_cross_entropy, *other, target), want, 1e-6)
    assert_close(gradients(tse.linear_cross_entropy, x, w, b, target.repeat_interleave(2)[::2]), want, 1e-6)
    deep = gradients(tse.linear_cross_entropy, x.view(4, 15, 24), w, b, target.view(4, 15), reduction="none")
    assert deep[0].shape == (4, 15)
    assert deep[1].shape == (4, 15, 24)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(device, dtype):
    x, w, b, target, _ = problem(device)
    with torch.autocast(device.type, dtype):
        got = gradients(tse.linear_cross_entropy, x, w, b, target)
    assert all(t.dtype == torch.float32 for t in got)
    want = gradients(tse.linear_cross_entropy, *(t.to(dtype) for t in (x, w, b)), target)
    assert torch.equal(got[0], want[0])
    assert all(torch.equal(p, q.float()) for p, q in zip(got[1:], want[1:], strict=True))


@reductions
def test_compiled_with_all_gradients(device, reduction):
    torch._dynamo.reset()
    compiled = torch.compile(tse.linear_cross_entropy, fullgraph=True, backend="aot_eager")
    for dtype in (torch.float32, torch.float16):
        x, w, b, target, o = problem(device, dtype=dtype, options=True)
        o |= {"reduction": reduction, "chunk_size": 16}
        got, want = (
            gradients(
                f, x, w, b, target, torch.tensor(0.3, device=device).expand(60 if reduction == "none" else ()), **o
            )
            for f in (compiled, tse.linear_cross_entropy)
        )
        torch.testing.assert_close(got, want)


def test_checkpointing_keeps_no_gradient(device):
    x, w, b, target, _ = problem(device, rows=64, features=512, classes=2000)
    leaves = [t.requires_grad_() for t in (x, w, b)]
    want = torch.autograd.grad(tse.linear_cross_entropy(x, w, target, linear_bias=b), leaves)
    peak = peak_memory(
        lambda: checkpoint(lambda: tse.linear_cross_entropy(x, w, target, linear_bias=b), use_reentrant=False), device
    )
    assert peak < w.nbytes / 2
    loss = checkpoint(lambda: tse.linear_cross_entropy(x, w, target, linear_bias=b), use_reentrant=False)
    assert all(torch.equal(p, q) for p, q in zip(torch.autograd.grad(loss, leaves), want, strict=True))


def test_memory_does_not_grow_with_the_logits(device):
    """Besides the gradients, at most an eighth of the logits, and no more than a chunk of them."""
    x, w, b, target, _ = problem(device, rows=4096, features=64, classes=1000)
    logits, own = 4 * 4096 * 1000, x.nbytes + w.nbytes + b.nbytes
    if device.type == "cuda":
        own += (1 << 18) + 1024  # scratch of the grid's blocks, whatever the size

    def step(**options):
        return lambda: gradients(tse.linear_cross_entropy, x, w, b, target, **options)

    assert peak_memory(step(), device) - own < logits / 8
    assert peak_memory(step(chunk_size=16), device) - own < logits / 50
    assert peak_memory(step(chunk_size=16, reduction="none"), device) - own < logits / 50
    with torch.no_grad():
        forward = lambda: tse.linear_cross_entropy(x, w, target, linear_bias=b)  # noqa: E731
        assert peak_memory(forward, device) < logits / 8


def test_weight_that_requires_grad(device):
    x, w, _, target, _ = problem(device)
    with pytest.raises(RuntimeError, match="linear_cross_entropy: weight: expected no gradient"):
        tse.linear_cross_entropy(x, w, target, weight=torch.ones(501, device=device, requires_grad=True))


def test_module_with_weight_and_bias(device):
    x, w, b, target, _ = problem(device)
    weight = torch.rand(501)
    module = tse.LinearCrossEntropyLoss(weight, chunk_size=9).to(device)
    want = tse.linear_cross_entropy(x, w, target, linear_bias=b, weight=weight.to(device), chunk_size=9)
    assert torch.equal(module(x, w, target, b), want)
    torch.testing.assert_close(want, F.cross_entropy(F.linear(x, w, b), target, weight.to(device)))


@log_odds
def test_loss_and_gradient_near_certainty(log_odds, device):
    x, target = near_certain("rows of 1000", torch.float32, log_odds, device)
    identity = torch.eye(x.shape[1], device=device)
    check_near_certainty(tse.linear_cross_entropy(x, identity, target, reduction="none"), x, target)
