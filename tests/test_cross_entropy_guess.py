"""cross_entropy writes its gradient in forward, for a guess of grad_output: the guess must not change a bit."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from conftest import dtypes, for_cpu
from cross_entropy_cases import grad, logits_and_target
from torch.utils.checkpoint import checkpoint

import torch_softmax_ext as tse
from torch_softmax_ext.testing.memory import peak_memory


@pytest.mark.full_on_host
@dtypes
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_guess_never_changes_a_bit(device, dtype, reduction):
    """After any sequence of backwards, the gradient has the bits of reduction 'none' with the same factor."""
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
    """Logits whose later blocks of 4096 classes exceed the reference that the first block set."""
    x = 3 * torch.randn(rows, classes, device=device)
    x[:, 5000] = 30
    return x.to(dtype), torch.randint(classes, (rows,), device=device)


@pytest.fixture
def two_threads():
    """Fewer threads than rows, so that the CPU kernels do not split a row."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


# For rows of up to 262144 elements the CPU kernels keep the terms of the sum; for longer ones they compute them again.
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
        for _ in range(3):  # from the second call on the guess is right
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
    for _ in range(3):  # a wrong guess, none, a right one
        got = grad(tse.cross_entropy, x, target, scale=65536.0)[1]
        counted = target != -100
        assert (got[counted] != 0).all()
        assert (got.double() - want).norm() <= 2**-10 * want.norm()


@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_the_guess_under_checkpointing(device, scale):
    """Recomputation must save the same tensors, whatever other calls came between."""
    x, target = logits_and_target(device)
    want = grad(tse.cross_entropy, x, target, scale=1.0)[1]
    z = x.detach().requires_grad_()
    losses = [checkpoint(lambda z: tse.cross_entropy(z, target), z, use_reentrant=False) for _ in range(2)]
    for _ in range(3):
        grad(tse.cross_entropy, x, target, scale=scale)
    (losses[0] + losses[1]).backward()
    torch.testing.assert_close(z.grad, 2 * want)


@for_cpu
def test_checkpointing_keeps_no_gradient():
    x = torch.randn(512, 4096, requires_grad=True)
    target = torch.randint(0, 4096, (512,))
    loss = lambda z: tse.cross_entropy(z, target)  # noqa: E731
    assert peak_memory(lambda: loss(x)) > 0.99 * x.nbytes  # the gradient of a guess
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
    """Several forwards, then their backwards, with a factor that changes in between."""
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


@pytest.mark.full_on_host
def test_threads_do_not_mix_their_sums(device):
    """Several threads call at the same time, each with many blocks' losses to add."""
    x, target = logits_and_target(device, rows=256, classes=3)
    want = tse.cross_entropy(x, target)

    def is_right(_):
        return all(torch.equal(tse.cross_entropy(x, target), want) for _ in range(100))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(is_right, range(4)))


@pytest.mark.full_on_host
@dtypes
def test_the_guess_over_many_rows_with_weights(device, dtype):
    """So many rows that a separate CUDA kernel sums the weights. Loss and gradient keep their bits."""
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


@pytest.mark.gpu
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_cuda_graphs_beside_eager_calls(scale, in_place):
    """Each graph has its own ticket and guess; the host never waits for the device."""
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
