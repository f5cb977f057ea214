"""What only a GPU shows, for every operator: kernels under compute-sanitizer, CUDA graphs, streams, devices."""

import pytest
import torch
from conftest import dtypes, specs, specs_where

pytestmark = pytest.mark.gpu
kernels = specs_where(lambda spec: spec.has_kernels)  # the others read values on the host, and wait for them


def inputs(spec, rows, n, dtype=torch.float32, device="cuda"):
    x = torch.randn(rows, n, device=device).to(dtype)
    return x, tuple(a.to(device) for a in spec.bench_args(x))


def wave_like(y):
    return torch.linspace(1, 60, y.numel(), device=y.device).sin().view(y.shape).to(y.dtype)


def value_and_grad(function, x, *args, dtype=None):
    """For a grad_output of many different values, rounded to `dtype`."""
    x = x.detach().requires_grad_()
    y = function(x, *args)
    g = wave_like(y.to(dtype or y.dtype))
    return y.detach(), torch.autograd.grad(y, x, g.to(y.dtype))[0]


def assert_like_reference(spec, x, args, got, tolerance):
    y, g = value_and_grad(spec.reference, x.double(), *args, dtype=got[0].dtype)
    torch.testing.assert_close(got[0].double(), y, rtol=tolerance, atol=tolerance / 10)
    # A gradient may be small compared with the largest of its row, or not exist.
    where = torch.ones_like(g, dtype=torch.bool)
    if spec.differentiable is not None:
        where = spec.differentiable(x.double(), *args)
    assert ((got[1].double() - g)[where].abs() <= tolerance * g.abs().max()).all()


@pytest.mark.sanitized
@kernels
@dtypes
@pytest.mark.parametrize("n", [33, 200, 500, 1000, 1031, 9001, 50257, 70001])
def test_every_kernel(spec, dtype, n):
    """A row for some lanes of a warp, for a warp, for a block; within shared memory and beyond; aligned and not."""
    x, args = inputs(spec, 3, n, dtype)
    tolerance = {torch.float64: 1e-10, torch.float32: 1e-4}.get(dtype, 1e-2)
    assert_like_reference(spec, x, args, value_and_grad(spec.op, x, *args), tolerance)


@kernels
@pytest.mark.parametrize("shape", [(64, 100), (16, 50257)], ids=str)
def test_graph_capture(spec, shape):
    """A replay of forward and backward computes with the input's values at that time."""
    x, args = inputs(spec, *shape)
    static = x.clone().requires_grad_()
    g_out = wave_like(spec.op(x, *args))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            y = spec.op(static, *args)
            torch.autograd.grad(y, static, g_out)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = spec.op(static, *args)
        (g,) = torch.autograd.grad(y, static, g_out)
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
    """The kernels run on the current stream, after the slow work that produces their input."""
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
    """Tensors on another device than the current one."""
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
