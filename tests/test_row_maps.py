"""Row maps with tensors beside the logits: temperatures and masks, their gradients; what other libraries got wrong
with them. The gradients of alpha are in test_entmax.py, what all operators share in test_all_ops.py."""

import pytest
import torch

import torch_softmax_ext as tse
from torch_softmax_ext.testing import SPECS
from torch_softmax_ext.testing.entmax import SPEC as ENTMAX

close = torch.testing.assert_close
INF = float("inf")
MAPS = [s for s in SPECS if s.name in ("softmax", "log_softmax", "sparsemax", "entmax15", "entmax")]
maps = pytest.mark.parametrize("spec", MAPS, ids=lambda s: s.name)
probabilities = pytest.mark.parametrize("spec", [s for s in MAPS if s.name != "log_softmax"], ids=lambda s: s.name)
SOFTMAX = next(s for s in MAPS if s.name == "softmax")


def inputs(device, dtype=torch.float64):
    """Logits, a temperature for each of three heads, an additive mask of keys."""
    generator = torch.Generator().manual_seed(3)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype).requires_grad_()

    return normal(2, 3, 4, 6), normal(3, 1, 1).detach().exp().requires_grad_(), normal(2, 1, 1, 6)


def call(function):
    return lambda x, t, m: function(x, temperature=t, mask=m)


# ---- gradients ------------------------------------------------------------------------------------------------------


@maps
def test_gradients_of_temperature_and_mask(spec, device):
    tensors = inputs(device)
    got, want = call(spec.op)(*tensors), call(spec.reference)(*tensors)
    close(got, want)
    g = torch.randn_like(got)
    close(torch.autograd.grad(got, tensors, g), torch.autograd.grad(want, tensors, g))


@maps
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gradients_of_temperature_and_mask_in_other_dtypes(spec, device, dtype):
    """With an offset, which must not cost the temperature's gradient its digits."""
    x, t, m = (tensor.detach().to(dtype) for tensor in inputs(device))
    tensors = [tensor.requires_grad_() for tensor in (x + (1000 if dtype == torch.float32 else 0), t, m)]
    got = call(spec.op)(*tensors)
    g = torch.randn_like(got)
    wide = [tensor.detach().double().requires_grad_() for tensor in tensors]
    want = call(spec.reference)(*wide)
    tolerance = {torch.float32: 2e-4, torch.bfloat16: 0.05, torch.float16: 0.01}[dtype]
    for a, b in zip(torch.autograd.grad(got, tensors, g), torch.autograd.grad(want, wide, g.double()), strict=True):
        assert a.dtype == dtype
        assert (a.double() - b).norm() <= tolerance * b.norm()


@pytest.mark.not_on_host
@maps
def test_gradcheck_of_temperature_and_mask(spec, device):
    x, t, m = inputs(device)
    x, m = (tensor.detach()[:1, :, :2].requires_grad_() for tensor in (x, m))
    for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert check(call(spec.op), (x, t, m), check_batched_grad=True)


def test_only_what_requires_grad_gets_a_gradient(device):
    x, t, m = inputs(device)
    for leaf in (x, t, m):
        tensors = [tensor if tensor is leaf else tensor.detach() for tensor in (x, t, m)]
        (got,) = torch.autograd.grad(call(tse.softmax)(*tensors).square().sum(), leaf)
        close(got, torch.autograd.grad(call(SOFTMAX.reference)(x, t, m).square().sum(), leaf)[0])


# ---- masks ----------------------------------------------------------------------------------------------------------


@maps
@pytest.mark.parametrize("n", [40, 700])
def test_what_is_masked_does_not_matter(spec, device, n):
    x = torch.randn(3, n, device=device)
    kept = torch.rand(3, n, device=device) < 0.5
    kept[2] = False
    want = spec.op(x, mask=kept)
    for junk in (float("nan"), INF, -INF, 3e38):
        z = x.masked_fill(~kept, junk).requires_grad_()
        y = spec.op(z, mask=kept)
        close(y, want, rtol=0, atol=0)
        (g,) = torch.autograd.grad(y, z, torch.ones_like(y))
        assert torch.equal(g[~kept], torch.zeros_like(g[~kept]))
    empty = want[2]
    assert torch.equal(empty, torch.full_like(empty, -INF if spec.name == "log_softmax" else 0))


@probabilities
def test_a_mask_in_every_broadcast_shape(spec, device):
    x = torch.randn(2, 3, 4, 5, device=device)
    for shape in [(5,), (1, 1), (4, 1), (4, 5), (3, 1, 1), (2, 1, 1, 5), (1, 3, 4, 1), (2, 1, 4, 5), (2, 3, 4, 5), ()]:
        kept = torch.rand(shape, device=device) < 0.6
        added = torch.randn(shape, device=device)
        for dim in (-1, 0, 2):
            close(spec.op(x, dim=dim, mask=kept), spec.reference(x, dim=dim, mask=kept))
            close(spec.op(x, dim=dim, mask=added), spec.reference(x, dim=dim, mask=added))


@maps
def test_an_added_mask_of_minus_inf_is_a_boolean_mask(spec, device):
    x = torch.randn(4, 50, device=device, requires_grad=True)
    kept = torch.rand(4, 50, device=device) < 0.5
    added = torch.zeros(4, 50, device=device).masked_fill(~kept, -INF).requires_grad_()
    a, b = spec.op(x, mask=kept), spec.op(x, mask=added)
    close(a, b)
    g = torch.rand(4, 50, device=device).masked_fill(~kept, 0)
    close(torch.autograd.grad(a, x, g)[0], torch.autograd.grad(b, (x, added), g)[0])


# ---- transforms and graphs ------------------------------------------------------------------------------------------


@pytest.mark.not_on_host
@maps
def test_vmap_over_any_of_the_tensors(spec, device):
    x, t, m = (tensor.detach() for tensor in inputs(device))
    batched = {0: torch.stack([x, x * 2]), 1: torch.stack([t, t + 1]), 2: torch.stack([m, -m])}
    for which in ((0,), (1,), (2,), (0, 2), (1, 2), (0, 1, 2)):
        args = [batched[i] if i in which else (x, t, m)[i] for i in range(3)]
        in_dims = tuple(0 if i in which else None for i in range(3))
        want = torch.stack([call(spec.op)(*(a[k] if i in which else a for i, a in enumerate(args))) for k in range(2)])
        close(torch.func.vmap(call(spec.op), in_dims)(*args), want)


@pytest.mark.not_on_host
@maps
def test_compiles_with_tensors(spec, device):
    x, t, m = inputs(device, torch.float32)
    compiled = torch.compile(call(spec.op), fullgraph=True, backend="aot_eager")
    got, want = compiled(x, t, m), call(spec.op)(x, t, m)
    close(got, want)
    g = torch.randn_like(want)
    close(torch.autograd.grad(got, (x, t, m), g), torch.autograd.grad(want, (x, t, m), g))


@pytest.mark.not_on_host
@maps
def test_opcheck_with_tensors(spec, device):
    pytest.importorskip("expecttest", reason="torch's opcheck needs expecttest")
    x, t, m = inputs(device, torch.float32)
    options = {"row_temperature": t, "mask": m, "dtype": torch.float64}
    if spec.name == "entmax":
        options["row_alpha"] = torch.full((3, 1, 1), 1.4, device=device, requires_grad=True)
    torch.library.opcheck(spec.overload, (x,), options)


@pytest.mark.not_on_host
def test_func_transforms_over_tensors(device):
    x, t, m = (tensor.detach() for tensor in inputs(device))
    for spec in MAPS:
        for argnums in (0, 1, 2):
            ours, reference = (
                torch.func.grad(lambda *a, f=f: call(f)(*a).square().sum(), argnums) for f in (spec.op, spec.reference)
            )
            close(ours(x, t, m), reference(x, t, m))
        ours, reference = (
            torch.func.jvp(call(f), (x, t, m), tuple(torch.ones_like(v) * 0.3 + v for v in (x, t, m)))
            for f in (spec.op, spec.reference)
        )
        close(ours, reference)
    a = torch.full((3, 1, 1), 1.3, device=device, dtype=torch.float64)
    _, got = torch.func.jvp(lambda a: tse.entmax(x, a), (a,), (torch.ones_like(a),))
    _, want = torch.func.jvp(lambda a: ENTMAX.reference(x, alpha=a), (a,), (torch.ones_like(a),))
    close(got, want)


# ---- modules --------------------------------------------------------------------------------------------------------


def test_a_learnable_alpha_stays_in_its_range(device):
    """deep-spin/entmax #39: a plain parameter left the range of alpha in training."""
    start = torch.tensor([1.2, 1.5, 1.9])[:, None, None]
    module = tse.Entmax(start, learnable=True).to(device)
    close(module.alpha.detach().cpu(), start)
    x = torch.randn(2, 3, 4, 6, device=device)
    close(module(x), tse.entmax(x, start.to(device)))
    optimizer = torch.optim.SGD(module.parameters(), lr=1e4)
    for _ in range(5):
        module(x, mask=x > -1).square().sum().backward()
        optimizer.step()
        assert ((module.alpha >= 1) & (module.alpha <= 2)).all()
    assert not torch.equal(module.alpha.detach().cpu(), start)
    assert [n for n, _ in module.named_parameters()] == ["alpha_logit"]
    with pytest.raises(
        ValueError, match=r"Entmax: alpha: expected values between 1 and 2 where it is learnable, got 2\.5"
    ):
        tse.Entmax(2.5, learnable=True)
    assert "alpha=<(3, 1, 1)>, dim=-1, learnable=True" in repr(module)
    parameter = module.alpha_logit
    module.alpha = 1.25
    assert module.alpha_logit is parameter
    close(module.alpha.detach().cpu(), torch.full((3, 1, 1), 1.25))
    with pytest.raises(ValueError, match="Entmax: alpha: expected values between 1 and 2"):
        module.alpha = 3.0


def test_modules_take_a_mask(device):
    x, kept = torch.randn(3, 5, device=device), torch.rand(3, 5, device=device) < 0.5
    for module, function in ((tse.Softmax, tse.softmax), (tse.LogSoftmax, tse.log_softmax), (tse.Entmax, tse.entmax)):
        assert torch.equal(module(dim=0, temperature=2.0)(x, kept), function(x, dim=0, temperature=2.0, mask=kept))


@pytest.mark.parametrize("value", [300.0, 1e-3])
def test_gradient_of_a_half_temperature(device, value):
    x = torch.randn(2, 5, device=device) * value
    t = torch.full((2, 1), value, device=device, dtype=torch.float16)
    g = torch.randn(2, 5, device=device)
    got, want = (
        torch.autograd.grad(tse.softmax(x, temperature=w), w, g)[0]
        for w in (t.clone().requires_grad_(), t.float().requires_grad_())
    )
    close(got.float(), want, rtol=2e-3, atol=1e-7)


@pytest.mark.not_on_host
def test_double_backward_of_a_temperature_for_no_gradient(device):
    x, t, _ = inputs(device)
    for f in (tse.softmax, torch.softmax):
        y = f(x, -1, temperature=t) if f is tse.softmax else f(x / t, -1)
        v = torch.zeros_like(y, requires_grad=True)
        (g,) = torch.autograd.grad(y, t, v, create_graph=True)
        (second,) = torch.autograd.grad(g.sum(), v)
        if f is tse.softmax:
            got = second
    close(got, second)


def test_modules_hold_tensors_as_buffers_and_parameters():
    module = tse.Softmax(temperature=torch.tensor(2.0))
    assert [n for n, _ in module.named_buffers()] == ["temperature"]
    module.temperature = 1.0
    assert module.temperature == 1.0
    assert not list(module.named_buffers())
    for module in (
        tse.Entmax(torch.nn.Parameter(torch.tensor(1.5))),
        tse.EntmaxLoss(torch.nn.Parameter(torch.ones(()))),
    ):
        assert [n for n, _ in module.named_parameters()] == ["alpha"]
    assert [n for n, _ in tse.Entmax(temperature=torch.ones(1)).named_buffers()] == ["temperature"]


@pytest.mark.not_on_host
def test_dim_out_of_range_under_vmap(device):
    with pytest.raises(IndexError, match=r"softmax: dim: expected a dimension in \[-1, 0\] under vmap, got 5"):
        torch.func.vmap(lambda v: tse.softmax(v, 5))(torch.zeros(3, 300, device=device))
