"""cross_entropy with inplace_backward: the gradient overwrites the logits, and autograd notices later uses of them."""

import sys

import pytest
import torch
from conftest import dtypes, for_cpu
from cpu_isa import check_at_the_end_of_a_page, levels
from cross_entropy_cases import grad, logits_and_target

import torch_softmax_ext as tse
from torch_softmax_ext.testing.memory import peak_memory


@pytest.mark.full_on_host
@dtypes
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("scale", [1.0, 0.25, 0.3])
def test_inplace_backward_gives_the_gradient(device, dtype, reduction, scale):
    x, target = logits_and_target(device, dtype=dtype)
    want = grad(tse.cross_entropy, x, target, reduction=reduction, scale=scale)
    for _ in range(3):
        got = grad(tse.cross_entropy, x, target, reduction=reduction, scale=scale, inplace_backward=True)
        assert torch.equal(got[0], want[0])
        tolerance = {torch.float64: 1e-15, torch.float32: 3e-7}.get(dtype, torch.finfo(dtype).eps)
        assert (got[1].double() - want[1].double()).abs().max() <= tolerance * want[1].double().abs().max()


@pytest.mark.parametrize("shape", [(2, 7, 5, 3), (4, 9), (9,), (1, 70000)], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels", "sliced"])
def test_inplace_backward_writes_into_the_logits(device, shape, layout):
    x = torch.randn(shape, device=device)
    if layout == "channels":
        x = x.movedim(min(1, x.dim() - 1), -1).contiguous().movedim(-1, min(1, x.dim() - 1))
    if layout == "sliced":
        x = torch.stack([x, x], -1)[..., 0]
    target = torch.randint(
        0, shape[0] if len(shape) == 1 else shape[1], (() if len(shape) == 1 else (shape[0], *shape[2:]))
    )
    want = grad(tse.cross_entropy, x, target.to(device))[1]
    z = x.detach().requires_grad_()
    if layout == "sliced":
        base = torch.empty(*shape, 2, device=device)
        logits = (base.requires_grad_() * 1)[..., 0]
        with torch.no_grad():
            logits.copy_(x)
    else:
        logits = z * 1
    loss = tse.cross_entropy(logits, target.to(device), inplace_backward=True)
    torch.testing.assert_close(logits.detach(), want)
    loss.backward()


@for_cpu
def test_inplace_backward_needs_no_second_buffer():
    x = torch.randn(512, 4096, requires_grad=True)
    target = torch.randint(0, 4096, (512,))
    tse.cross_entropy(x * 1, target).backward()

    def step(inplace):
        z = x * 1
        return peak_memory(lambda: tse.cross_entropy(z, target, inplace_backward=inplace))

    assert step(True) < 0.01 * x.nbytes
    assert step(False) > 0.99 * x.nbytes


def test_wrong_uses_are_refused_or_noticed_in_backward(device):
    x, target = logits_and_target(device, 8, 50)
    leaf = x.clone().requires_grad_()
    with pytest.raises(RuntimeError, match="cross_entropy: inplace_backward: expected logits that were computed"):
        tse.cross_entropy(leaf, target, inplace_backward=True)
    with pytest.raises(RuntimeError, match="cross_entropy: inplace_backward: expected logits that were computed"):
        tse.cross_entropy(leaf.view_as(leaf), target, inplace_backward=True)
    with pytest.raises(RuntimeError, match="elements do not share memory"):
        tse.cross_entropy((leaf * 1)[:1].expand(8, 50), target, inplace_backward=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):  # tanh has saved its result
        tse.cross_entropy(leaf.tanh(), target, inplace_backward=True).backward()
    logits = leaf * 1
    loss = tse.cross_entropy(logits, target, inplace_backward=True)
    with torch.no_grad():
        logits.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    loss = tse.cross_entropy(leaf * 1, target, inplace_backward=True)
    with pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.grad(loss, leaf, create_graph=True)
    with torch.no_grad():
        kept = x.clone()
        tse.cross_entropy(kept, target, inplace_backward=True)
        assert torch.equal(kept, x)


@pytest.mark.parametrize(
    "options",
    [
        {"weight": True},
        {"label_smoothing": 0.1},
        {"z_loss_weight": 0.1, "temperature": 0.5},
        {"softcap": 4.0},
        {"probabilities": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("shape", [(8, 30), (2, 30, 5)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradient_in_place_with_options(device, options, shape, dtype):
    """The same bits as out of place, in the memory of the logits."""
    options = dict(options)
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=dtype, device=device)
    rows = (shape[0], *shape[2:])
    target = torch.randint(0, 30, rows, device=device)
    if options.pop("probabilities", False):
        target = torch.randn(shape, device=device).softmax(1).to(dtype)
    weight = torch.rand(30, device=device) + 0.5 if options.pop("weight", False) else None
    results = []
    for in_place in (False, True):
        leaf = x.clone().requires_grad_()
        logits = leaf * 2
        loss = tse.cross_entropy(logits, target, weight, inplace_backward=in_place, **options)
        (grad,) = torch.autograd.grad(loss, leaf)
        results.append((loss, grad))
        assert in_place == (logits._version > 0)
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def test_earlier_extreme_gradients_do_not_matter(device):
    """An earlier grad_output must not make this gradient overflow or underflow."""
    x, target = logits_and_target(device, dtype=torch.float32)
    target = target.clamp_min(0)
    for last, now in ((1e-42, 1.0), (1e30, 1e-20), (1.0, 1.0)):
        for scale in (last, last, last, now):
            leaf = x.detach().requires_grad_()
            (got,) = torch.autograd.grad(tse.cross_entropy(leaf * 1, target, inplace_backward=True) * scale, leaf)
        (want,) = torch.autograd.grad(tse.cross_entropy(leaf.double(), target) * now, leaf)
        torch.testing.assert_close(got, want.float(), rtol=1e-4, atol=1e-6 * now)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"label_smoothing": "a"}, TypeError, "label_smoothing: expected float, got str"),
        ({"reduction": None}, ValueError, "reduction: expected 'none', 'mean' or 'sum', got None"),
        ({"ignore_index": torch.zeros(3)}, TypeError, "ignore_index: expected int, got Tensor"),
        ({"ignore_index": 2**70}, ValueError, "ignore_index: expected 64 bits"),
    ],
    ids=str,
)
def test_bad_options_in_place_or_not(device, options, error, text):
    x, target = logits_and_target(device)
    for in_place in (False, True):
        with pytest.raises(error, match=f"cross_entropy: {text}"):
            tse.cross_entropy(x.detach().requires_grad_() * 1, target, inplace_backward=in_place, **options)


def shared_elsewhere(device, how):
    """Logits whose elements share memory. For the last three, torch's check answers "too hard"."""
    base = torch.randn(40, device=device, requires_grad=True) * 1
    return {
        "expanded": lambda: base[:4].expand(3, 4),
        "unfold": lambda: base.unfold(0, 7, 1),
        "as_strided": lambda: base.as_strided((5, 4), (3, 1)),
        "transposed": lambda: base.as_strided((5, 4), (1, 3)),
    }[how]()


@pytest.mark.parametrize("how", ["expanded", "unfold", "as_strided", "transposed"])
def test_logits_that_overlap_themselves_are_refused(device, how):
    logits = shared_elsewhere(device, how)
    target = torch.zeros(len(logits), dtype=torch.long, device=device)
    before = logits.detach().clone()
    with pytest.raises(RuntimeError, match="cross_entropy: inplace_backward: expected logits whose elements do not"):
        tse.cross_entropy(logits, target, inplace_backward=True)
    assert torch.equal(logits, before)


@pytest.mark.parametrize("how", ["every-other", "permuted", "rows", "split", "one-row", "padded", "no-rows"])
def test_sliced_logits_are_not_taken_for_overlapping(device, how):
    x = torch.randn(4, 6, 8, device=device, requires_grad=True)

    def logits():
        y = x * 1
        return {
            "every-other": lambda: y.flatten(0, 1)[:, ::2],
            "permuted": lambda: y.permute(1, 2, 0),
            "rows": lambda: y[:, 1],
            "split": lambda: y.split(3, 1)[0].select(0, 0),
            "one-row": lambda: y[:1, 0].as_strided((1, 8), (1, 1)),
            "padded": lambda: y[..., :5].flatten(0, 1),
            "no-rows": lambda: y[:0, 0].expand(0, 8),
        }[how]()

    shape = logits().shape
    target = torch.zeros(shape[0], *shape[2:], dtype=torch.long, device=device)
    (want,) = torch.autograd.grad(tse.cross_entropy(logits(), target, reduction="sum"), x)
    (got,) = torch.autograd.grad(tse.cross_entropy(logits(), target, reduction="sum", inplace_backward=True), x)
    torch.testing.assert_close(got, want)


def test_target_or_weight_in_the_memory_of_the_logits_is_refused(device):
    x = torch.randn(3, 4, device=device, requires_grad=True) * 1
    with pytest.raises(RuntimeError, match="inplace_backward: expected logits in memory of their own"):
        tse.cross_entropy(x, x.detach(), inplace_backward=True)
    with pytest.raises(RuntimeError, match="inplace_backward: expected logits in memory of their own"):
        tse.cross_entropy(x, torch.zeros(3, dtype=torch.long, device=device), x[0].detach(), inplace_backward=True)


def later_use(logits, passed, use):
    """A computation with overwritten logits: with `logits`, the tensor that was `passed`, or another view."""
    return {"logits": logits, "passed": passed, "slice": logits.flatten()[1:], "alias": passed.view_as(passed)}[use]


@pytest.mark.parametrize("view", [None, "flatten", "slice", "transpose", "split"])
@pytest.mark.parametrize("use", ["logits", "passed", "slice", "alias"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_later_use_of_overwritten_logits_raises_in_backward(device, view, use, reduction):
    leaf = torch.randn(2, 5, 7, device=device, requires_grad=True)
    logits = (leaf * 1) if view is not None else leaf.flatten(0, 1) * 1
    passed = {
        None: lambda: logits,
        "flatten": lambda: logits.view(-1, 7),
        "slice": lambda: logits[:, :-1].select(0, 0),
        "transpose": lambda: logits.transpose(1, 2),
        "split": lambda: logits.split(3, 1)[0].select(0, 0),
    }[view]()
    shape = (passed.shape[0], *passed.shape[2:])
    loss = tse.cross_entropy(
        passed, torch.ones(shape, dtype=torch.long, device=device), inplace_backward=True, reduction=reduction
    ).sum()
    with pytest.raises(RuntimeError, match=r"that are not used afterwards|modified inplace"):
        (loss + later_use(logits, passed, use).sin().sum()).backward()
    assert leaf.grad is None


def test_earlier_uses_and_reading_values_afterwards_are_allowed(device):
    """An earlier use that saved nothing, and a look at the memory without gradients."""
    leaf = torch.randn(6, 7, device=device, requires_grad=True)
    target = torch.arange(6, device=device)
    (want,) = torch.autograd.grad(tse.cross_entropy(leaf * 2, target) + (leaf * 2).sum(), leaf)
    logits = leaf * 2
    earlier = logits.sum()
    loss = tse.cross_entropy(logits, target, inplace_backward=True)
    assert logits.requires_grad
    assert logits.detach().sum().isfinite()
    (got,) = torch.autograd.grad(loss + earlier, leaf)
    torch.testing.assert_close(got, want)


def test_the_base_may_be_written_into_again(device):
    """Each step fills the same buffer again."""
    leaf = torch.randn(6, 7, device=device, requires_grad=True)
    target = torch.arange(6, device=device)
    (want,) = torch.autograd.grad(tse.cross_entropy(leaf * 2, target), leaf)
    buffer = torch.empty(6, 7, device=device)
    for _ in range(2):
        buffer = buffer.detach()
        buffer.copy_(leaf * 2)
        (got,) = torch.autograd.grad(tse.cross_entropy(buffer, target, inplace_backward=True), leaf)
        torch.testing.assert_close(got, want)


def test_expanded_logits_in_place(device):
    x = torch.randn(1, 4, device=device, requires_grad=True) * 1
    with pytest.raises(RuntimeError, match="cross_entropy: inplace_backward: expected logits whose elements do not"):
        tse.cross_entropy(x.expand(3, 4), torch.zeros(3, dtype=torch.long, device=device), inplace_backward=True)


AT_THE_END_OF_A_PAGE = """
target = torch.zeros(2, dtype=torch.long)
leaf = x.clone().requires_grad_()
tse.cross_entropy(leaf, target).backward()
written = end_of_page.copy(x)
logits = written.mul_(torch.ones((), dtype=dtype, requires_grad=True))  # computed, in that memory
tse.cross_entropy(logits, target, inplace_backward=True).backward()
want = x if dtype == torch.float16 else leaf.grad  # float16 computes its gradient in backward
assert torch.equal(written.detach(), want), (dtype, n)
"""


@for_cpu
@pytest.mark.skipif(sys.platform != "linux", reason="asks for mprotect")
@levels
def test_nothing_after_the_logits_is_written(level):
    check_at_the_end_of_a_page(level, AT_THE_END_OF_A_PAGE)
