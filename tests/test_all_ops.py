"""The tests that every operator must pass, over its spec, devices and dtypes: values and gradients, torch's checks,
errors, autocast, saved tensors, checkpointing, modules, equal bits and threads."""

import contextlib
import copy
import pickle
import threading

import pytest
import torch
from conftest import (
    CUDA_ON_HOST,
    dtypes,
    dtypes_in_full_on_host,
    first,
    for_cpu,
    get,
    samples,
    small_samples,
    specs,
    specs_where,
)
from torch.utils.checkpoint import checkpoint

from torch_softmax_ext.testing import SPECS


def value_and_grad(function, sample, input, g=None):
    """The result, the gradient, and the grad_output it was computed for."""
    x = input.detach().requires_grad_()  # detach keeps the strides
    y = sample.call(function, x)
    g = torch.randn(y.shape, dtype=torch.float64, device=y.device) if g is None else g
    (gx,) = torch.autograd.grad(y, x, g.to(y.dtype))
    return y.detach(), gx, g.to(y.dtype)


def assert_close(ours, reference, torchs, what):
    """Our error against float64 is at most twice torch's in the same precision, plus one rounding of the result; for
    float32 results of half types, what docs/numerics.md promises.
    """
    assert ours.shape == reference.shape
    ours, torchs = ours.double(), torchs.double()
    assert torch.equal(ours.isnan(), reference.isnan()), what
    infinite = reference.isinf()
    assert torch.equal(ours[infinite], reference[infinite]), what
    usable = reference.isfinite()
    if not usable.any():
        return
    ours, torchs, reference = ours[usable], torchs[usable], reference[usable]
    result, logits = what[1], what[2]
    rounding = {torch.float64: 4e-12, torch.float32: 1e-6}.get(result, torch.finfo(result).eps)
    if logits.itemsize == 2 and result == torch.float32:
        rounding = 6e-6
    scale = reference.abs().max().item()
    allowed = 2 * (torchs - reference).abs().nan_to_num().max().item() + rounding * scale + 1e-13
    error = (ours - reference).abs().max().item()
    assert error <= allowed, (what, error, allowed)
    if what[0] == "gradient" and reference.numel() > 4096:  # small values too: in wide rows large ones would hide them
        subnormal = 2.0**-25 * reference.numel() ** 0.5 if result == torch.float16 else 0.0
        for part in (reference.abs() >= 0, reference.abs() < scale / 10):
            error, norm = (ours - reference)[part].norm().item(), reference[part].norm().item()
            assert error <= rounding * norm + subnormal, (what, error, norm)


@pytest.mark.values
@samples
@dtypes_in_full_on_host
def test_values_and_gradients(spec, sample, device, dtype):
    s = get(spec, sample, device, dtype)
    y, gx, g = value_and_grad(spec.op, s, s.input)
    y64, gx64, _ = value_and_grad(spec.reference, s, s.input.double(), g)
    yt, gxt, _ = value_and_grad(spec.torch_op, s, s.input, g)
    assert gx.dtype == dtype
    assert gx.shape == s.input.shape
    assert_close(y, y64, yt, ("value", y.dtype, dtype, s.name))
    if s.finite:
        if spec.differentiable is not None:
            where = s.call(spec.differentiable, s.input.double())
            gx, gx64, gxt = (g.where(where, torch.zeros_like(g)) for g in (gx, gx64, gxt))
        assert_close(gx, gx64, gxt, ("gradient", dtype, dtype, s.name))
    with torch.no_grad():  # another path through the dispatcher
        assert torch.equal(s.call(spec.op).nan_to_num(), y.nan_to_num())


@pytest.mark.values
@pytest.mark.not_on_host
@small_samples
def test_gradcheck(spec, sample, device):
    s = get(spec, sample, device, torch.float64)
    x = s.input.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: s.call(spec.op, x), (x,), check_batched_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: s.call(spec.op, x), (x,), check_batched_grad=True)


@pytest.mark.not_on_host
@small_samples
def test_opcheck(spec, sample, device):
    pytest.importorskip("expecttest", reason="torch's opcheck needs expecttest")
    s = get(spec, sample, device, torch.float32)
    torch.library.opcheck(spec.overload, (s.input.requires_grad_(), *s.args), s.kwargs)


@specs
@dtypes
def test_double_backward_in_every_dtype(spec, device, dtype):
    s = first(spec, device, dtype)

    def second(function, x):
        x = x.detach().requires_grad_()
        y = s.call(function, x)
        (gx,) = torch.autograd.grad((y.double() ** 2).sum(), x, create_graph=True)
        return torch.autograd.grad((gx.double() ** 2).sum(), x)[0]

    want = second(spec.reference, s.input.double())
    got = second(spec.op, s.input)
    assert (got.double() - want).norm() <= max(1e-5, 4 * torch.finfo(dtype).eps) * want.norm()


@specs
def test_grad_output_of_any_strides(spec, device):
    s = first(spec, device, torch.float64)
    x = s.input.requires_grad_()
    y = s.call(spec.op, x)
    g = torch.randn(*y.shape, 2, device=device, dtype=y.dtype)
    for grad in (g[..., 1], torch.ones((), device=device, dtype=y.dtype).expand_as(y), g[..., 0].flip(0)):
        want = torch.autograd.grad(s.call(spec.reference, x), x, grad)[0]
        torch.testing.assert_close(torch.autograd.grad(y, x, grad, retain_graph=True)[0], want)


# ---- modes of torch -----------------------------------------------------------------------------------------------


@specs
def test_inference_mode(spec, device):
    s = first(spec, device, torch.float32)
    with torch.inference_mode():
        y = s.call(spec.op)
    assert y.is_inference()
    assert torch.equal(y, s.call(spec.op))


@pytest.mark.parametrize(
    ("spec", "case"), [(s, c) for s in SPECS for c in s.errors], ids=lambda v: getattr(v, "name", None)
)
def test_errors(spec, case, device):
    if case.cpu_only and CUDA_ON_HOST:  # a device-side assertion, as the executor reports it
        with pytest.raises(RuntimeError, match=f"device-side assertion: {spec.name}"):
            case.call(device)
        return
    if case.cpu_only and device.type == "cuda":
        pytest.skip("a device-side assertion would end the CUDA context")
    for mode in (torch.enable_grad, torch.inference_mode):
        with mode(), pytest.raises(case.error, match=f"{spec.name}: {case.match}"):
            case.call(device)


@specs_where(lambda s: not s.autocasts)  # those that do have their own tests
@dtypes
def test_autocast_changes_nothing(spec, device, dtype):
    s = first(spec, device, dtype)
    with torch.autocast(device.type, torch.bfloat16):
        y = s.call(spec.op)
    assert y.dtype == s.call(spec.op).dtype
    assert torch.equal(y, s.call(spec.op))


@specs
def test_saved_tensor_modified_in_place_is_caught(spec, device):
    s = first(spec, device, torch.float32)
    x = s.input.clone().requires_grad_()
    z = x * 1
    y = s.call(spec.op, z)
    (y if spec.saves_output else z).detach().zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@specs
def test_same_gradient_with_checkpointing_and_deterministic_algorithms(spec, device):
    s = first(spec, device, torch.float32)
    x = s.input.requires_grad_()
    (want,) = torch.autograd.grad(s.call(spec.op).sum(), x)
    torch.use_deterministic_algorithms(True)
    try:
        y = checkpoint(lambda x: s.call(spec.op, x), x, use_reentrant=False)
        (got,) = torch.autograd.grad(y.sum(), x)
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(got, want)


@specs
def test_retain_graph_gives_the_same_gradient_twice(spec, device):
    s = first(spec, device, torch.float32)
    x = s.input.requires_grad_()
    y = s.call(spec.op)
    a, b = (torch.autograd.grad(y, x, torch.full_like(y, f), retain_graph=True)[0] for f in (1.0, 0.5))
    assert torch.equal(a * 0.5, b)


@specs_where(lambda s: s.module is not None)
def test_module_computes_the_function_also_after_copying_and_pickling(spec, device):
    s = first(spec, device, torch.float32)
    module = spec.module()
    for m in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(m(s.input, *s.args), spec.op(s.input, *s.args))
        assert repr(m) == repr(module)
    assert "=" in repr(module)


# ---- the same bits ------------------------------------------------------------------------------------------------


def value_and_grad_of_rows(spec, x, *args):
    x = x.detach().requires_grad_()
    y = spec.op(x, *args, **spec.row_options)
    g = (
        torch.linspace(1, 2, x.shape[1], device=x.device).to(y.dtype).expand_as(y)
        if y.dim() > 1
        else torch.ones_like(y)
    )
    return y.detach(), torch.autograd.grad(y, x, g)[0]


@contextlib.contextmanager
def threads(count):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.mark.values
@specs_where(lambda s: s.batch_invariant)
@dtypes_in_full_on_host
@pytest.mark.parametrize("shape", [(67, 10), (9, 300), (5, 9000), (3, 50257)], ids=str)
def test_same_bits_alone_in_a_batch_and_with_any_threads(spec, device, dtype, shape):
    x = torch.randn(shape, device=device).to(dtype)
    args = tuple(a.to(device) for a in spec.bench_args(x))
    y, g = value_and_grad_of_rows(spec, x, *args)
    for count in (1,) if CUDA_ON_HOST else (1, 2, 3):
        with threads(count):
            assert all(torch.equal(a, b) for a, b in zip(value_and_grad_of_rows(spec, x, *args), (y, g), strict=True))
            y1, g1 = value_and_grad_of_rows(spec, *spec.rows(x, *args))
        assert torch.equal(y1, y[:1])
        assert torch.equal(g1, g[:1])


@for_cpu
@pytest.mark.values
@specs_where(lambda s: s.batch_invariant)
@dtypes
@pytest.mark.parametrize("scale", [1.0, 1e-4], ids=["some-large", "flat"])
def test_same_bits_where_threads_share_a_row(spec, dtype, scale):
    x = (torch.randn(1, 200003) * scale).to(dtype)
    args = spec.bench_args(x)
    results = []
    for count in (1, 2, 5):
        with threads(count):
            results.append(value_and_grad_of_rows(spec, x, *args))
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


@specs
def test_python_threads_do_not_disturb_each_other(spec, device):
    s = first(spec, device, torch.float32)
    want = s.call(spec.op)
    wrong = []

    def work():
        for _ in range(50):
            if not torch.equal(s.call(spec.op), want):
                wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong
