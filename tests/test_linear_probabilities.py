"""linear_cross_entropy with class probabilities as targets."""

import pytest
import torch
import torch.nn.functional as F
from conftest import reductions

import torch_softmax_ext as tse
from torch_softmax_ext.testing.linear_cross_entropy import SPEC
from torch_softmax_ext.testing.memory import peak_memory

close = torch.testing.assert_close
OPTIONS = {"label_smoothing": 0.1, "z_loss_weight": 0.2, "softcap": 5.0, "temperature": 0.7}


def grads(function, leaves, *args, **options):
    """The result and the gradients of all leaves."""
    leaves = [t.detach().requires_grad_() for t in leaves]
    y = function(*leaves, *args, **options)
    g = torch.linspace(0.5, 1, y.numel(), dtype=y.dtype, device=y.device).reshape(y.shape)
    return y.detach(), *torch.autograd.grad(y, leaves, g)


def problem(device, dtype, shape=(9,)):
    generator = torch.Generator().manual_seed(1)

    def normal(*sizes):
        return torch.randn(sizes, generator=generator, dtype=torch.float64).to(device, dtype)

    return normal(*shape, 6), normal(5, 6), normal(5), normal(*shape, 5).softmax(-1)


def reference(x, w, b, target, **options):
    return SPEC.reference(x, w, target, linear_bias=b, **options)


def ours(x, w, b, target, **options):
    return tse.linear_cross_entropy(x, w, target, linear_bias=b, **options)


@reductions
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(9,), (2, 5), (), (0,)], ids=str)
@pytest.mark.parametrize("options", [{}, {**OPTIONS, "weight": True}], ids=["plain", "options"])
def test_values_and_gradients(device, dtype, reduction, shape, options):
    x, w, b, target = problem(device, dtype, shape)
    o = {**options, "reduction": reduction}
    if o.pop("weight", False):
        o["weight"] = torch.rand(5, device=device) + 0.5
    want = grads(reference, [t.double() for t in (x, w, b)], target.double(), **{**o, **double(o)})
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype]
    for chunk_size in (None, 2):
        got = grads(ours, [x, w, b], target, chunk_size=chunk_size, **o)
        assert got[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        for a, e in zip(got, want, strict=True):
            close(
                a.double(),
                e,
                rtol=tolerance,
                atol=tolerance * max(1, e.abs().max().item() if e.numel() else 1),
                equal_nan=True,
            )
    with torch.no_grad():
        close(ours(x, w, b, target, **o), got[0], equal_nan=True, rtol=1e-5, atol=1e-6)


def double(options):
    return {k: v.double() for k, v in options.items() if isinstance(v, torch.Tensor)}


@reductions
def test_the_same_as_torchs(device, reduction):
    x, w, b, target = problem(device, torch.float32)
    weight = torch.rand(5, device=device)

    def torchs(x, w, b, t, c):
        return F.linear_cross_entropy(x, w, t, linear_bias=b, weight=c, reduction=reduction, label_smoothing=0.1)

    def mine(x, w, b, t, c):
        return tse.linear_cross_entropy(x, w, t, linear_bias=b, weight=c, reduction=reduction, label_smoothing=0.1)

    close(grads(mine, [x, w, b, target, weight]), grads(torchs, [x, w, b, target, weight]))
    close(grads(mine, [x, w, b], target, weight), grads(torchs, [x, w, b], target, weight))


@reductions
@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.float32, torch.float64),
        (torch.float16, torch.float64),
    ],
    ids=str,
)
def test_probabilities_of_another_dtype(device, reduction, dtypes):
    x, w, b, target = problem(device, torch.float64)
    x, w, b, target = *(t.to(dtypes[0]) for t in (x, w, b)), target.to(dtypes[1])
    got = grads(ours, [x, w, b], target, reduction=reduction, chunk_size=4)
    want = grads(reference, [t.double() for t in (x, w, b)], target.double(), reduction=reduction)
    assert got[0].dtype == (torch.float64 if torch.float64 in dtypes else torch.float32)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtypes[0]]
    for a, e in zip(got, want, strict=True):
        close(a.double(), e, rtol=tolerance, atol=tolerance * max(1, e.abs().max().item()))


@pytest.mark.full_on_host
def test_derivatives_and_modes(device):
    x, w, b, target = problem(device, torch.float64)
    leaves = [t.requires_grad_() for t in (x, w, b, target)]

    def function(*t):
        return tse.linear_cross_entropy(t[0], t[1], t[3], linear_bias=t[2], chunk_size=2, **OPTIONS)

    assert torch.autograd.gradcheck(function, leaves, check_batched_grad=True, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, leaves)
    op = torch.ops.torch_softmax_ext.linear_cross_entropy.default
    torch.library.opcheck(op, (x, w, target.detach(), b), {"chunk_size": 4})
    batch = torch.stack([x, 2 * x])
    got = torch.func.vmap(lambda x: function(x, w, b, target))(batch)
    close(got, torch.stack([function(v, w, b, target) for v in batch]))
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    close(compiled(*(t.detach() for t in leaves)), function(*leaves).detach())


def test_the_logits_are_never_stored():
    x, w = torch.randn(4096, 16, requires_grad=True), torch.randn(1000, 16, requires_grad=True)
    target = torch.rand(4096, 1000)
    peak = peak_memory(lambda: tse.linear_cross_entropy(x, w, target, chunk_size=64).backward())
    assert peak < target.nbytes / 8


@pytest.mark.parametrize(
    ("shape", "options", "text"),
    [
        ((3, 4), {}, r"target: expected class indices, or class probabilities \(…, 5\) .* \[3, 4\]"),
        ((2, 5), {}, "target: expected class indices, or class probabilities"),
        ((15,), {}, "target: expected class indices, or class probabilities"),
        ((3, 5), {"ignore_index": 2}, "ignore_index: expected none"),
        ((3, 5), {"weight": torch.ones(5) + 0j}, "weight: expected floating point"),
    ],
    ids=str,
)
def test_errors(device, shape, options, text):
    target = torch.rand(shape, device=device)
    x, w = torch.randn(3, 6, device=device), torch.randn(5, 6, device=device)
    options = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    with pytest.raises(RuntimeError, match=f"linear_cross_entropy: {text}"):
        tse.linear_cross_entropy(x, w, target, **options)
