"""What only a GPU shows: graphs, streams, devices, long tensors, and kernels under compute-sanitizer (`make gpu`)."""

import subprocess
import sys

import pytest
import torch

import torch_softmax_ext as tse
from torch_softmax_ext.testing import SPECS

pytestmark = pytest.mark.gpu
specs = pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.name)
# What has no kernels of its own asks the device how many rows count.
KERNELS = [s for s in SPECS if s.has_kernels]
kernels = pytest.mark.parametrize("spec", KERNELS, ids=lambda s: s.name)
dtypes = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:]
)


def inputs(spec, rows, n, dtype=torch.float32, device="cuda"):
    x = torch.randn(rows, n, device=device).to(dtype)
    return x, tuple(a.to(device) for a in spec.bench_args(x))


def incoming_for(y):
    return torch.linspace(1, 60, y.numel(), device=y.device).sin().view(y.shape).to(y.dtype)


def value_and_grad(function, x, *args, dtype=None):
    """For an incoming gradient that waves, as `dtype` rounds it."""
    x = x.detach().requires_grad_()
    y = function(x, *args)
    g = incoming_for(y.to(dtype or y.dtype))
    return y.detach(), torch.autograd.grad(y, x, g.to(y.dtype))[0]


def assert_like_reference(spec, x, args, got, tolerance):
    y, g = value_and_grad(spec.reference, x.double(), *args, dtype=got[0].dtype)
    torch.testing.assert_close(got[0].double(), y, rtol=tolerance, atol=tolerance / 10)
    # A gradient is small beside the largest of its row, and sparsemax has none at the edge of the support.
    where = torch.ones_like(g, dtype=torch.bool)
    if spec.differentiable is not None:
        where = spec.differentiable(x.double(), *args)
    assert ((got[1].double() - g)[where].abs() <= tolerance * g.abs().max()).all()


@kernels
@dtypes
@pytest.mark.parametrize("n", [33, 200, 500, 1000, 1031, 9001, 50257, 70001])
def test_every_kernel(spec, dtype, n):
    """Rows of lanes, warps and blocks, in and beyond shared memory, aligned and not: what compute-sanitizer watches."""
    x, args = inputs(spec, 3, n, dtype)
    tolerance = {torch.float64: 1e-10, torch.float32: 1e-4}.get(dtype, 1e-2)
    assert_like_reference(spec, x, args, value_and_grad(spec.op, x, *args), tolerance)


@pytest.mark.parametrize("dtype", [torch.float32], ids=["float32"])
@pytest.mark.parametrize(("rows", "n"), [(9000, 33), (2500, 1100)])
def test_every_kernel_row_after_row(dtype, rows, n):
    """Blocks that work on several rows, and divisors that are counted before."""
    x, target, weight = torch.randn(rows, n), torch.randint(0, n, (rows,)), torch.rand(n)
    want = value_and_grad(torch.nn.functional.cross_entropy, x.double(), target, weight.double())
    got = value_and_grad(tse.cross_entropy, x.cuda(), target.cuda(), weight.cuda())
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.double().cpu(), b, rtol=1e-4, atol=1e-9)


@specs
def test_columns(spec):
    if spec.name == "sparsemax":
        x = torch.randn(5, 70, 40, device="cuda")
        torch.testing.assert_close(tse.sparsemax(x, 1), spec.reference(x, 1))
    elif spec.name == "cross_entropy":
        x, target = torch.randn(5, 70, 40, device="cuda"), torch.randint(0, 70, (5, 40), device="cuda")
        assert_like_reference(spec, x, (target,), value_and_grad(spec.op, x, target), 1e-4)
    else:
        pytest.skip("of the last dimension alone")


@kernels
@pytest.mark.parametrize("shape", [(64, 100), (16, 50257)], ids=str)
def test_graph_capture(spec, shape):
    """Forward and backward are captured, and a replay computes what stands in the input then."""
    x, args = inputs(spec, *shape)
    static = x.clone().requires_grad_()
    incoming = incoming_for(spec.op(x, *args))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            y = spec.op(static, *args)
            torch.autograd.grad(y, static, incoming)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = spec.op(static, *args)
        (g,) = torch.autograd.grad(y, static, incoming)
    fresh = torch.randn_like(x)
    with torch.no_grad():
        static.copy_(fresh)
    graph.replay()
    graph.replay()
    want = value_and_grad(spec.op, fresh, *args)
    torch.testing.assert_close((y.detach(), g), want)


@kernels
def test_no_synchronisation(spec):
    x, args = inputs(spec, 64, 1000)
    value_and_grad(spec.op, x, *args)
    torch.cuda.set_sync_debug_mode("error")
    try:
        value_and_grad(spec.op, x, *args)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@specs
def test_side_stream(spec):
    """The kernels run on the current stream: behind the work that makes their input, which takes a while."""
    x, args = inputs(spec, 256, 5000)
    want = value_and_grad(spec.op, x, *args)
    late = torch.zeros_like(x)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(20_000_000)
        late.copy_(x)
        got = value_and_grad(spec.op, late, *args)
        torch.cuda.current_stream().synchronize()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
@specs
def test_second_device(spec):
    """Tensors of another device than the current one."""
    x, args = inputs(spec, 16, 70000, device="cuda:1")
    got = value_and_grad(spec.op, x, *args)
    assert got[0].device == x.device
    assert torch.cuda.current_device() == 0
    assert_like_reference(spec, x, args, got, 1e-3)


@specs
def test_same_bits_every_time(spec):
    x, args = inputs(spec, 300, 32000, torch.bfloat16)
    first = value_and_grad(spec.op, x, *args)
    for _ in range(10):
        assert all(torch.equal(a, b) for a, b in zip(value_and_grad(spec.op, x, *args), first, strict=True))


def needs_memory(count, dtype, copies):
    free = torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else 0
    if free < count * dtype.itemsize * copies:
        pytest.skip("not enough memory on the card")


def test_more_than_two_to_the_31_elements():
    check_more_than_two_to_the_31(33000)


@pytest.mark.full
def test_one_row_of_more_than_two_to_the_31_elements():
    """One thread walks through it: minutes, which `make gpu` does not have."""
    check_more_than_two_to_the_31(1)


def check_more_than_two_to_the_31(rows):
    n = 2**31 // rows + 1000
    needs_memory(rows * n, torch.bfloat16, 4)
    x = torch.zeros(rows, n, device="cuda", dtype=torch.bfloat16)
    x[-1, -1] = 30
    target = torch.full((rows,), n - 1, device="cuda")
    loss = tse.cross_entropy(x, target, reduction="none")
    torch.testing.assert_close(
        loss[-1].item(), torch.tensor(n / 2.718281828**30 + 1).log().item(), rtol=1e-3, atol=1e-6
    )
    if rows > 1:
        torch.testing.assert_close(loss[0].item(), torch.tensor(float(n)).log().item(), rtol=1e-4, atol=0)
    del loss
    y = tse.sparsemax(x)
    assert y[-1, -1].item() == 1
    assert y[-1, : n - 1].any().item() is False
    if rows > 1:
        torch.testing.assert_close(y[0, 5].item(), 1 / n, rtol=1e-2, atol=0)
    del y
    x.requires_grad_()
    tse.cross_entropy(x, target, reduction="sum").backward()
    if rows > 1:
        torch.testing.assert_close(x.grad[0, 5].item(), 1 / n, rtol=1e-2, atol=0)
    assert -1e-2 < x.grad[-1, -1].item() <= 0


@pytest.mark.parametrize("weight", ["None", "torch.ones(5, device='cuda')"])
@pytest.mark.parametrize("target", [5, -1])
def test_target_outside_the_classes_stops_the_kernel(target, weight):
    code = (
        "import torch, torch_softmax_ext as tse\n"
        f"tse.cross_entropy(torch.zeros(2, 5, device='cuda'), torch.tensor([0, {target}], device='cuda'), {weight})\n"
        "torch.cuda.synchronize()\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode != 0
    assert "device-side assert" in run.stderr
    assert "cross_entropy: target" in run.stdout + run.stderr
