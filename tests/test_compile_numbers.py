"""Options that change from step to step under torch.compile: at most three graphs, and the eager values."""

import numpy as np
import pytest
import torch
from conftest import CUDA_ON_HOST, reductions
from torch._dynamo.testing import CompileCounterWithBackend

import torch_softmax_ext as tse

pytestmark = pytest.mark.skipif(CUDA_ON_HOST, reason="nothing here depends on the kernels")


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def metrics(*args, **options):
    m = tse.cross_entropy_with_metrics(*args, **options)
    return m.loss.sum() + (m.z_loss * 3).sum() + (m.lse * m.lse).sum()


def linear(x, target, **options):
    w = torch.linspace(-1, 1, 24, dtype=x.dtype, device=x.device).reshape(6, 4)
    return tse.linear_cross_entropy(x, w * x.sum(), target, linear_bias=x[0, 0] + w[:, 0], **options)


def entropy(*args, **options):
    logp, h = tse.selective_log_softmax(*args, return_entropy=True, **options)
    return logp * 2 + h * h


LOSSES = {"cross_entropy": tse.cross_entropy, "metrics": metrics, "linear": linear}
FUNCTIONS = {**LOSSES, "selective": tse.selective_log_softmax, "entropy": entropy}
PAIRS = [
    (function, name)
    for function in FUNCTIONS
    for name in ("temperature", "softcap", "z_loss_weight")
    if function in LOSSES or name != "z_loss_weight"
]


def run(function, x, target, **options):
    leaf = x.clone().requires_grad_()
    y = function(leaf, target, **options)
    return y.detach(), torch.autograd.grad(y.square().sum(), leaf)[0]


CASES = [(*pair, "aot_eager") for pair in PAIRS]
CASES += [
    pytest.param(*pair, "inductor", marks=() if pair == PAIRS[0] else pytest.mark.full)
    for pair in PAIRS
    if pair[0] not in ("metrics", "entropy")  # same graphs
]


@pytest.mark.parametrize(("function", "name", "backend"), CASES)
def test_a_changing_number_compiles_at_most_three_graphs(device, function, name, backend):
    f = FUNCTIONS[function]
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(f, backend=counter, fullgraph=True)
    x, target = torch.randn(5, 4, device=device), torch.randint(0, 4, (5,), device=device)
    target[0] = 1
    for step in range(6):
        options = {name: 0.5 + 0.1 * step}
        for got, want in zip(run(compiled, x, target, **options), run(f, x, target, **options), strict=True):
            torch.testing.assert_close(got, want)
    assert counter.frame_count <= 3


MAPS = [
    (tse.softmax, "temperature"),
    (tse.log_softmax, "temperature"),
    (tse.sparsemax, "temperature"),
    (tse.entmax, "temperature"),
    (tse.entmax, "alpha"),
]


@pytest.mark.parametrize(("function", "name"), MAPS, ids=lambda v: getattr(v, "__name__", v))
def test_a_changing_number_of_a_map_compiles_at_most_three_graphs(device, function, name):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda x, **options: function(x, **options) * 2, backend=counter, fullgraph=True)
    x = torch.randn(5, 4, device=device, requires_grad=True)
    for step in range(6):
        options = {name: 1.2 + 0.1 * step}
        got, want = compiled(x, **options), function(x, **options) * 2
        torch.testing.assert_close(got, want)
        g = torch.randn_like(want)
        torch.testing.assert_close(torch.autograd.grad(got, x, g), torch.autograd.grad(want, x, g))
    assert counter.frame_count <= 3


def test_a_changing_alpha_of_a_loss_compiles_at_most_three_graphs(device):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda x, t, a: tse.entmax_loss(x, t, a) * 2, backend=counter, fullgraph=True)
    x, target = torch.randn(5, 4, device=device, requires_grad=True), torch.randint(0, 4, (5,), device=device)
    for step in range(6):
        got, want = (f(x, target, 1.2 + 0.1 * step) for f in (compiled, lambda *t: tse.entmax_loss(*t) * 2))
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(torch.autograd.grad(got, x), torch.autograd.grad(want, x))
    assert counter.frame_count <= 3


@reductions
@pytest.mark.parametrize("function", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.full)], ids=str)
def test_numbers_that_change_together_compile_at_most_three_graphs(device, function, reduction, dtype):
    f = LOSSES[function]
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(f, backend=counter, fullgraph=True)
    x, target = torch.randn(5, 4, device=device).to(dtype), torch.randint(0, 4, (5,), device=device)
    target[2] = -100
    for step in range(5):
        names = ("temperature", "softcap", "z_loss_weight")
        options = {n: 0.5 + 0.1 * step * (i + 1) for i, n in enumerate(names)}
        options |= {"reduction": reduction, "label_smoothing": 0.1}
        for got, want in zip(run(compiled, x, target, **options), run(f, x, target, **options), strict=True):
            eps = 4 * torch.finfo(dtype).eps  # bfloat16 gradients are summed in another order
            torch.testing.assert_close(got, want, rtol=eps, atol=eps * want.abs().max().item())
        with torch.no_grad():
            torch.testing.assert_close(compiled(x, target, **options), f(x, target, **options))
    assert counter.frame_count <= 6  # three with gradients, three without


def test_a_changing_number_with_probabilities_of_another_dtype(device):
    compiled = torch.compile(tse.cross_entropy, backend="aot_eager", fullgraph=True)
    x, target = torch.randn(5, 4, device=device), torch.rand(5, 4, device=device, dtype=torch.float64)
    for temperature in (0.5, 0.6, 0.7):
        got, want = (run(f, x, target, temperature=temperature) for f in (compiled, tse.cross_entropy))
        torch.testing.assert_close(got, want)


def test_a_changing_number_with_gradients_of_class_probabilities(device):
    """The gradients are right, though each number is compiled for."""
    compiled = torch.compile(tse.cross_entropy, backend="aot_eager", fullgraph=True)
    x, target = torch.randn(5, 4, device=device), torch.rand(5, 4, device=device)
    for temperature in (0.5, 0.6, 0.7):
        got, want = (
            run(lambda t, x, f=f, **o: f(x, t, **o), target, x, temperature=temperature)
            for f in (compiled, tse.cross_entropy)
        )
        torch.testing.assert_close(got, want)


def test_a_wrong_number_raises_when_it_runs(device):
    compiled = torch.compile(tse.cross_entropy, backend="aot_eager", fullgraph=True)
    x, target = torch.randn(5, 4, device=device), torch.randint(0, 4, (5,), device=device)
    for temperature in (0.5, 0.6, 0.7):
        compiled(x, target, temperature=temperature)
    with pytest.raises(ValueError, match="cross_entropy: temperature: expected a positive number, got -1"):
        compiled(x, target, temperature=-1.0)


@pytest.mark.parametrize("number", [torch.tensor(0.7), np.float32(0.7), np.float64(0.7)], ids=repr)
def test_tensors_and_numpys_numbers_in_a_graph(device, number):
    x, target = torch.randn(5, 4, device=device), torch.randint(0, 4, (5,), device=device)
    for function in ("cross_entropy", "linear", "selective"):
        f = FUNCTIONS[function]
        got = run(torch.compile(f, backend="aot_eager", fullgraph=True), x, target, temperature=number)
        torch.testing.assert_close(got, run(f, x, target, temperature=float(number)))


def test_a_changing_number_under_autocast(device):
    def f(x, target, temperature):
        with torch.autocast(device.type, torch.bfloat16):
            return linear(x, target, temperature=temperature)

    compiled = torch.compile(f, backend="aot_eager", fullgraph=True)
    x, target = torch.randn(5, 4, device=device), torch.randint(0, 4, (5,), device=device)
    for temperature in (0.5, 0.6, 0.7):
        torch.testing.assert_close(compiled(x, target, temperature), f(x, target, temperature), rtol=2e-2, atol=1e-2)


@reductions
def test_chunk_size_of_the_batch_shares_a_graph(device, reduction):
    def f(x, target):
        return linear(x, target, chunk_size=x.shape[0] // 2, reduction=reduction)

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(f, backend=counter, fullgraph=True)
    for rows in (8, 10, 12, 15, 40):
        x, target = torch.randn(rows, 4, device=device), torch.randint(0, 4, (rows,), device=device)
        torch.testing.assert_close(run(compiled, x, target), run(f, x, target))
    assert counter.frame_count <= 3
