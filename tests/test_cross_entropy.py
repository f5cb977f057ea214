"""What only cross_entropy has: accuracy, guessing the incoming gradient, writing the gradient in place."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from conftest import CUDA_ON_HOST
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import torch_softmax_ext as tse
from torch_softmax_ext.testing.memory import peak_memory

dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)


def logits_and_target(device, rows=40, classes=3000, dtype=torch.float32, scale=3.0):
    x = (torch.randn(rows, classes, dtype=torch.float64) * scale).to(device, dtype)
    target = torch.randint(0, classes, (rows,), device=device)
    target[::7] = -100
    return x, target


def grad(function, x, *args, scale=1.0, **kwargs):
    x = x.detach().requires_grad_()
    z = x * 1  # computed, so that it may be written in place
    loss = function(z, *args, **kwargs) * scale
    loss.sum().backward()
    return loss.detach(), x.grad


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


def test_a_certain_prediction_costs_nothing_and_no_loss_is_negative(device):
    x = torch.zeros(4, 10, device=device)
    x[:, 3] = torch.tensor([20.0, 40.0, 200.0, 1e30], device=device)
    loss = tse.cross_entropy(x, torch.full((4,), 3, device=device), reduction="none")
    assert (loss >= 0).all()
    assert (loss[1:] == 0).all()
    many = torch.randn(20000, 5, device=device) * 10
    assert (tse.cross_entropy(many, many.argmax(1), reduction="none") >= 0).all()


def test_ignored_rows_have_no_gradient_whatever_their_logits(device):
    x = torch.randn(3, 50, device=device)
    x[1, 7], x[1, 8] = float("nan"), float("inf")
    for reduction in ("none", "mean", "sum"):
        loss, g = grad(tse.cross_entropy, x, torch.tensor([1, -100, 2], device=device), reduction=reduction)
        assert loss.isfinite().all()
        assert (g[1] == 0).all()


@dtypes
@pytest.mark.parametrize("classes", [50, 9000])
def test_impossible_classes_have_no_gradient_at_all(device, dtype, classes):
    x = torch.randn(4, classes, device=device).to(dtype)
    x[:, ::3] = -float("inf")
    for reduction in ("none", "sum", "sum"):
        g = grad(tse.cross_entropy, x, torch.full((4,), 1, device=device), reduction=reduction)[1]
        assert (g[:, ::3] == 0).all()
        assert (g[:, 1] != 0).all()


@dtypes
def test_nan_of_any_bits_stays_nan(device, dtype):
    """All bits set: a carry out of rounding to 16 bits would make it a zero."""
    x = torch.randn(2, 40, device=device).to(dtype).requires_grad_()
    loss = tse.cross_entropy(x, torch.tensor([1, 2], device=device), reduction="none")
    nan = torch.tensor([0x7FFFFFFF] * 2, dtype=torch.int32, device=device).view(torch.float32).to(loss.dtype)
    assert torch.autograd.grad(loss, x, nan)[0].isnan().all()


@pytest.mark.skipif(CUDA_ON_HOST, reason="for the CPU kernels")
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}], ids=str)
def test_images_are_read_where_they_lie(options):
    x, target = torch.randn(2, 100, 32, 32), torch.randint(100, (2, 32, 32))
    assert peak_memory(lambda: tse.cross_entropy(x, target, **options)) < 0.1 * x.nbytes


# ---- the guess of the incoming gradient ---------------------------------------------------------------------------


@dtypes
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_guess_never_changes_a_bit(device, dtype, reduction):
    """Whatever came before, the gradient has the bits of reduction 'none' with the same factor."""
    x, target = logits_and_target(device, dtype=dtype)
    counted = (target != -100).sum().item()
    for scale in (1.0, 0.25, 0.25, 0.25, 1 / 3, 1 / 7, 1 / 7, 1 / 7, 1.0, 65536.0, 65536.0, 65536.0, 1.0, 1.0, 1.0):
        _, g = grad(tse.cross_entropy, x, target, reduction=reduction, scale=scale)
        unit = torch.tensor(scale, dtype=torch.float64 if dtype == torch.float64 else torch.float32, device=device)
        factor = (unit.double() / counted).to(unit.dtype) if reduction == "mean" else unit
        z = x.detach().requires_grad_()
        y = tse.cross_entropy(z, target, reduction="none")
        (want,) = torch.autograd.grad(y, z, factor.expand_as(y))
        assert torch.equal(g, want), scale


def late_maximum(device, dtype, rows, classes):
    """Logits whose later blocks of 4096 classes outgrow the first one's reference."""
    x = 3 * torch.randn(rows, classes, device=device)
    x[:, 5000] = 30
    return x.to(dtype), torch.randint(classes, (rows,), device=device)


@pytest.fixture
def two_threads():
    """Fewer than there are rows, so that the CPU kernels take rows, not parts of them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


# Of rows of up to 262144 the CPU kernels keep the terms of forward's sum, of longer ones they compute them again.
for_cpu = pytest.mark.skipif(CUDA_ON_HOST, reason="for the CPU kernels")
KEPT_AND_NOT = [9000, pytest.param(100003, marks=for_cpu), pytest.param(270001, marks=for_cpu)]


@dtypes
@pytest.mark.parametrize("classes", KEPT_AND_NOT)
def test_the_guess_changes_no_bit_of_rows_of_several_blocks(device, dtype, classes, two_threads):
    x, target = late_maximum(device, dtype, 3, classes)
    unit = torch.float64 if dtype == torch.float64 else torch.float32
    z = x.detach().requires_grad_()
    rows = tse.cross_entropy(z, target, reduction="none")
    (want,) = torch.autograd.grad(rows, z, torch.ones_like(rows, dtype=unit))
    for _ in range(3):
        assert torch.equal(grad(tse.cross_entropy, x, target, reduction="sum")[1], want)


@dtypes
def test_same_gradient_bits_alone_and_with_any_threads(device, dtype):
    x, target = late_maximum(device, dtype, 3, 32000)
    threads = torch.get_num_threads()
    try:
        for _ in range(3):  # the guess is right from the second on
            torch.set_num_threads(2)
            want = grad(tse.cross_entropy, x, target, reduction="sum")[1]
            alone = grad(tse.cross_entropy, x[1:2], target[1:2], reduction="sum")[1]
            torch.set_num_threads(1)
            one = grad(tse.cross_entropy, x[1:2], target[1:2], reduction="sum")[1]
            assert torch.equal(alone, want[1:2])
            assert torch.equal(one, want[1:2])
    finally:
        torch.set_num_threads(threads)


def test_fp16_under_a_loss_scale_loses_nothing_to_underflow(device):
    x, target = logits_and_target(device, rows=64, classes=5000, dtype=torch.float16, scale=0.1)
    want = grad(F.cross_entropy, x.double(), target, scale=65536.0)[1]
    for _ in range(3):  # guessed wrong, not guessed, guessed right
        got = grad(tse.cross_entropy, x, target, scale=65536.0)[1]
        counted = target != -100
        assert (got[counted] != 0).all()
        assert (got.double() - want).norm() <= 2**-10 * want.norm()


@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_the_guess_under_checkpointing(device, scale):
    """What is computed again must not depend on what was seen since; nor may it differ in what it saves."""
    x, target = logits_and_target(device)
    want = grad(tse.cross_entropy, x, target, scale=1.0)[1]
    z = x.detach().requires_grad_()
    losses = [checkpoint(lambda z: tse.cross_entropy(z, target), z, use_reentrant=False) for _ in range(2)]
    for _ in range(3):
        grad(tse.cross_entropy, x, target, scale=scale)
    (losses[0] + losses[1]).backward()
    torch.testing.assert_close(z.grad, 2 * want)


@pytest.mark.skipif(CUDA_ON_HOST, reason="allocations are the CPU kernels'")
def test_checkpointing_keeps_no_gradient():
    x = torch.randn(512, 4096, requires_grad=True)
    target = torch.randint(0, 4096, (512,))
    loss = lambda z: tse.cross_entropy(z, target)  # noqa: E731
    assert peak_memory(lambda: loss(x)) > 0.99 * x.nbytes  # a guess
    assert peak_memory(lambda: checkpoint(loss, x, use_reentrant=False)) < 0.01 * x.nbytes


def test_a_gradient_that_was_handed_out_may_be_changed(device):
    x, target = logits_and_target(device)
    want = grad(tse.cross_entropy, x, target)[1]
    for _ in range(3):
        z = x.detach().requires_grad_()
        loss = tse.cross_entropy(z, target)
        torch.autograd.grad(loss, z, retain_graph=True)[0].zero_()
        assert torch.equal(torch.autograd.grad(loss, z)[0], want)


def test_every_call_keeps_its_own_guess(device):
    """Forwards before backwards, and a factor that changes in between."""
    x, target = logits_and_target(device)
    factor = lambda scale: torch.tensor(scale, device=device) / (target != -100).sum()  # noqa: E731
    z = x.detach().requires_grad_()
    rows = tse.cross_entropy(z, target, reduction="none")
    for _ in range(2):
        grad(tse.cross_entropy, x, target, scale=0.25)
    losses = [tse.cross_entropy(z, target) for _ in range(4)]
    for loss, scale in zip(losses, (0.25, 0.5, 0.25, 0.25), strict=True):
        (want,) = torch.autograd.grad(rows, z, factor(scale).expand_as(rows), retain_graph=True)
        for _ in range(2):
            got = torch.autograd.grad(loss * scale, z, retain_graph=True)[0]
            assert torch.equal(got, want)


def test_threads_do_not_mix_their_sums(device):
    """Calls of several threads are under way at a time, each with the losses of many blocks to add."""
    x, target = logits_and_target(device, rows=256, classes=3)
    want = tse.cross_entropy(x, target)

    def is_right(_):
        return all(torch.equal(tse.cross_entropy(x, target), want) for _ in range(100))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(is_right, range(4)))


@dtypes
def test_the_guess_over_many_rows_with_weights(device, dtype):
    """So many rows that a CUDA kernel of its own adds their weights; loss and gradient keep their bits."""
    x, target = logits_and_target(device, rows=9000, classes=7, dtype=dtype)
    weight = torch.rand(7, device=device)
    with torch.no_grad():
        want_loss = tse.cross_entropy(x, target, weight)
    loss64, g64 = grad(F.cross_entropy, x.double(), target, weight.double())
    results = [grad(tse.cross_entropy, x, target, weight) for _ in range(4)]
    assert all(torch.equal(loss, want_loss) for loss, _ in results)
    assert all(torch.equal(g, results[0][1]) for _, g in results)
    assert (want_loss.double() - loss64).abs() <= 1e-6 * loss64
    assert (results[0][1].double() - g64).norm() <= max(1e-6, torch.finfo(dtype).eps) * g64.norm()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_cuda_graphs_beside_eager_calls(scale, in_place):
    """Each graph has its own ticket and guess; nothing waits for the device."""
    device = torch.device("cuda")
    x, target = logits_and_target(device)
    leaf = x.detach().requires_grad_()

    def step():
        loss = tse.cross_entropy(leaf * 1, target, inplace_backward=in_place) * scale
        return loss.detach(), torch.autograd.grad(loss, leaf)[0]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graphs = []
    for _ in range(2):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = step()
        graphs.append((graph, result, torch.cuda.Stream()))
    for _ in range(6):
        with torch.no_grad():
            leaf.copy_(torch.randn_like(leaf))
        want = grad(F.cross_entropy, leaf.double(), target, scale=scale)
        torch.cuda.synchronize()
        for graph, _, stream in graphs:
            with torch.cuda.stream(stream):
                graph.replay()
        eager = step()
        torch.cuda.synchronize()
        for got in (eager, *(result for _, result, _ in graphs)):
            torch.testing.assert_close(got[0].double(), want[0], rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(got[1].double(), want[1], rtol=1e-4, atol=1e-7)


# ---- in place -----------------------------------------------------------------------------------------------------


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


@pytest.mark.skipif(CUDA_ON_HOST, reason="allocations are the CPU kernels'")
def test_inplace_backward_needs_no_second_buffer():
    x = torch.randn(512, 4096, requires_grad=True)
    target = torch.randint(0, 4096, (512,))
    tse.cross_entropy(x * 1, target).backward()

    def step(inplace):
        z = x * 1
        return peak_memory(lambda: tse.cross_entropy(z, target, inplace_backward=inplace))

    assert step(True) < 0.01 * x.nbytes
    assert step(False) > 0.99 * x.nbytes


def test_inplace_backward_is_refused_or_noticed_where_it_would_be_wrong(device):
    x, target = logits_and_target(device, 8, 50)
    leaf = x.clone().requires_grad_()
    with pytest.raises(RuntimeError, match="cross_entropy: inplace_backward: expected logits that were computed"):
        tse.cross_entropy(leaf, target, inplace_backward=True)
    with pytest.raises(RuntimeError, match="cross_entropy: inplace_backward: expected logits that were computed"):
        tse.cross_entropy(leaf.view_as(leaf), target, inplace_backward=True)
    with pytest.raises(RuntimeError, match="elements do not share memory"):
        tse.cross_entropy((leaf * 1)[:1].expand(8, 50), target, inplace_backward=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):  # tanh saved its result
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


def test_class_weights_have_no_gradient(device):
    x, target = logits_and_target(device)
    weight = torch.ones(x.shape[1], device=device, requires_grad=True)
    for logits in (x, x.detach().requires_grad_(), x.detach().requires_grad_() * 1):
        for function in (tse.cross_entropy, tse.cross_entropy_with_metrics):
            with pytest.raises(RuntimeError, match="cross_entropy: weight: expected no gradient"):
                function(logits, target, weight)
    with pytest.raises(RuntimeError, match="cross_entropy: weight: expected no gradient"):
        tse.cross_entropy(logits, target, weight, inplace_backward=True)
    with torch.no_grad():
        assert torch.equal(tse.cross_entropy(x, target, weight), tse.cross_entropy(x, target))


# ---- in place of torch's own ---------------------------------------------------------------------------------------


def train(device, loss_module, steps=15):
    """A stock script: it knows nothing of this package."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(20, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10)).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    weight = torch.linspace(0.5, 1.5, 10, device=device)
    criterion = loss_module(weight=weight, label_smoothing=0.1, ignore_index=3)
    x, y = torch.randn(256, 20, device=device), torch.randint(0, 10, (256,), device=device)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        logits = model(x)
        loss = criterion(logits, y) + 0.1 * torch.nn.functional.cross_entropy(logits, logits.detach().softmax(-1))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("replaced", ["function", "module", "both"])
def test_drop_in(device, monkeypatch, replaced):
    want = train(device, torch.nn.CrossEntropyLoss)
    if replaced != "module":
        monkeypatch.setattr(torch.nn.functional, "cross_entropy", tse.cross_entropy)
    if replaced != "function":
        monkeypatch.setattr(torch.nn, "CrossEntropyLoss", tse.CrossEntropyLoss)
    torch.testing.assert_close(train(device, torch.nn.CrossEntropyLoss), want, rtol=2e-4, atol=0)
    assert want[-1] < want[0]


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
    """The same bits as without, in the memory of the logits."""
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


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.2, "softcap": 4.0, "temperature": 0.7}], ids=str)
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("shape", [(6,), (3, 6), (2, 5, 4)], ids=str)
def test_gradient_of_class_probabilities(device, options, reduction, shape):
    torch.manual_seed(0)
    dim = 0 if len(shape) == 1 else 1
    x = torch.randn(shape, dtype=torch.float64, device=device, requires_grad=True)
    q = torch.rand(shape, dtype=torch.float64, device=device).softmax(dim).requires_grad_()
    w = torch.rand(shape[dim], dtype=torch.float64, device=device) + 0.5

    def loss(x, q):
        return tse.cross_entropy(x, q, w, reduction=reduction, **options)

    assert torch.autograd.gradcheck(loss, (x, q))
    assert torch.autograd.gradgradcheck(loss, (x, q))
    assert torch.autograd.gradcheck(lambda q: loss(x.detach(), q), (q,))  # of the target alone
    (got,) = torch.autograd.grad(loss(x.float(), q.bfloat16()).sum(), q)
    (want,) = torch.autograd.grad(loss(x, q).sum(), q)
    torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)


def test_class_probabilities_of_another_dtype(device):
    """In the wider of the two, as torch."""
    x, q = torch.randn(4, 9, device=device), torch.randn(4, 9, device=device).softmax(1)
    for a, b in ((x, q.double()), (x.double(), q), (x.bfloat16(), q), (x.half(), q.bfloat16())):
        want = torch.nn.functional.cross_entropy(a, b)
        got = tse.cross_entropy(a, b)
        assert got.dtype == want.dtype
        close = {"rtol": 1e-2, "atol": 0} if a.itemsize == 2 else {}  # torch rounds its log-probabilities there
        torch.testing.assert_close(got, want, **close)
        torch.testing.assert_close(tse.cross_entropy(a.clone().requires_grad_(), b), got)
        with torch.inference_mode():  # below autograd
            assert torch.equal(tse.cross_entropy(a, b), got)


def test_no_classes(device):
    """Of class probabilities over nothing: as torch, NaN for the mean, and nothing divides by zero."""
    x, q = torch.empty(2, 0, device=device, requires_grad=True), torch.empty(2, 0, device=device, requires_grad=True)
    for reduction in ("mean", "sum", "none"):
        loss = tse.cross_entropy(x, q, reduction=reduction)
        torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(x, q, reduction=reduction), equal_nan=True)
        loss.sum().backward()
    with pytest.raises(RuntimeError, match="cross_entropy: input: expected at least one class"):
        tse.cross_entropy_with_metrics(x, q)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_vmap_with_weights(device, dtype):
    """ignore_index beyond the classes, and weights of any precision."""
    torch.manual_seed(0)
    x, target = torch.randn(3, 500, 5, device=device), torch.randint(0, 5, (500,), device=device)
    target[:7] = 9
    weight = (torch.rand(5, device=device) + 0.5).to(dtype)

    def loss(x):
        return tse.cross_entropy(x, target, weight, ignore_index=9, z_loss_weight=0.1)

    got = torch.func.vmap(loss)(x)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, torch.stack([loss(v) for v in x]))


def test_ignored_rows_that_are_not_finite(device):
    """Their gradient is 0 on every path."""
    x = torch.randn(4, 5, device=device)
    x[3], target = float("nan"), torch.tensor([0, 1, 2, -100], device=device)
    x.requires_grad_()
    for options in ({}, {"z_loss_weight": 0.1}, {"label_smoothing": 0.1, "softcap": 3.0}):
        for create_graph in (False, True):
            (g,) = torch.autograd.grad(tse.cross_entropy(x, target, **options), x, create_graph=create_graph)
            assert g.isfinite().all()
            assert g[3].abs().max() == 0
        g = torch.func.grad(lambda x, o=options: tse.cross_entropy(x, target, **o))(x.detach())
        assert g[3].abs().max() == 0
        assert g.isfinite().all()


def test_gradient_in_place_after_extreme_gradients(device):
    """What came before must not decide what a float can hold."""
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


def test_expanded_logits_in_place(device):
    x = torch.randn(1, 4, device=device, requires_grad=True) * 1
    with pytest.raises(RuntimeError, match="cross_entropy: inplace_backward: expected logits whose elements do not"):
        tse.cross_entropy(x.expand(3, 4), torch.zeros(3, dtype=torch.long, device=device), inplace_backward=True)


def test_probabilities_that_require_grad_share_a_graph(device):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda x, q: tse.cross_entropy(x * 1, q), fullgraph=True, backend=counter)
    for rows in (4, 6, 9, 11):
        x = torch.randn(rows, 5, device=device, requires_grad=True)
        q = torch.rand(rows, 5, device=device, requires_grad=True)
        compiled(x, q).backward()
    assert counter.frame_count == 2


def test_logits_that_a_transform_does_not_differentiate(device):
    x, target = torch.randn(4, 7, device=device), torch.randint(0, 7, (4,), device=device)
    want = torch.nn.functional.cross_entropy(x, target)
    a = torch.randn(3, device=device)
    torch.testing.assert_close(
        torch.func.grad(lambda a: a.sum() * tse.cross_entropy(x, target))(a), want.expand(3).contiguous()
    )
    detached = torch.func.grad(lambda x: x.sum() * tse.cross_entropy(x.detach(), target))(x)
    torch.testing.assert_close(detached, want.expand(4, 7).contiguous())
    torch.testing.assert_close(
        tse.cross_entropy(torch._neg_view(x), target), torch.nn.functional.cross_entropy(-x, target)
    )


def test_losses_of_any_number_of_rows(device):
    """Rows are finished several at a time; ignored ones, and ones that outgrow a block, among them."""
    for n in (3, 700, 9000):
        for rows in (1, 2, 15, 16, 17, 35):
            x, target = torch.randn(rows, n, device=device) * 3, torch.randint(0, n, (rows,), device=device)
            target[::3] = -100
            for reduction in ("none", "sum"):
                want = torch.nn.functional.cross_entropy(x.double(), target, reduction=reduction).float()
                got = tse.cross_entropy(x, target, reduction=reduction)
                torch.testing.assert_close(got, want, rtol=2e-6, atol=1e-6)
