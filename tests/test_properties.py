"""Random shapes, strides, dtypes and options (hypothesis), and random calls that must raise as torch does."""

import random

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import torch_softmax_ext as tse
from torch_softmax_ext.testing import SPECS
from torch_softmax_ext.testing.spec import FLOATING

REFERENCE = {s.name: s.reference for s in SPECS}
TOLERANCE = {torch.float32: 3e-6, torch.float64: 1e-11, torch.bfloat16: 8e-3, torch.float16: 2e-3}


@st.composite
def tensors(draw, minimum_rank=1):
    """Logits of any shape, dtype and strides: permuted, expanded, sliced, misaligned."""
    rank = draw(st.integers(minimum_rank, 4))
    shape = [draw(st.integers(1, 6)) for _ in range(rank)]
    shape[min(1, rank - 1)] = draw(st.one_of(st.integers(1, 70), st.sampled_from([127, 1000, 5000])))
    if rank > 2 and draw(st.booleans()):  # enough rows for whole vectors of them
        shape[1], shape[-1] = min(shape[1], 70), 40
    seed, scale = draw(st.integers(0, 2**31)), draw(st.sampled_from([0.01, 1.0, 5.0, 50.0]))
    generator = torch.Generator().manual_seed(seed)
    order = draw(st.one_of(st.just(list(range(rank))), st.permutations(range(rank))))
    step = draw(st.sampled_from([1, 1, 2]))
    offset = draw(st.integers(0, 3))
    sizes = [shape[d] for d in order]
    sizes[-1] *= step
    count = torch.Size(sizes).numel()
    dtype = draw(st.sampled_from(FLOATING))
    base = (torch.randn(offset + count, generator=generator, dtype=torch.float64) * scale).to(dtype)
    x = base[offset:].view(sizes)[..., ::step].permute([order.index(d) for d in range(rank)])
    if draw(st.booleans()):
        d = draw(st.integers(0, rank - 1))
        x = x.narrow(d, 0, 1).expand(shape)
    return x, generator


def check(function, reference, x, generator, args, kwargs, classes=1, weight=1.0, where=None):
    x, x64 = x.detach().requires_grad_(), x.detach().double().requires_grad_()
    args64 = [a.double() if torch.is_tensor(a) and a.is_floating_point() else a for a in args]
    y, want = function(x, *args, **kwargs), reference(x64, *args64, **kwargs)
    g = torch.randn(want.shape, generator=generator, dtype=torch.float64)
    (grad,) = torch.autograd.grad(y, x, g.to(y.dtype))
    (want_grad,) = torch.autograd.grad(want, x64, g.to(y.dtype).double())
    assert torch.equal(y.isnan(), want.isnan())
    scale = want.detach().abs().nan_to_num().max().clamp_min(1)
    # The exp of half types has an error of 3e-6 in each row's loss.
    value_tolerance = TOLERANCE[x.dtype] if y.dtype == x.dtype else 2e-5
    assert (y.double() - want).abs().nan_to_num().max() <= value_tolerance * scale
    if want.isnan().any():
        return
    if where is not None:
        grad, want_grad = (torch.where(where, v, torch.zeros_like(v)) for v in (grad, want_grad))
    # The gradient may be small only because p and the target nearly cancel, or a softcap saturates; much of a float16
    # gradient may be subnormal. So the error is also compared with the norm of grad_output.
    rows = max(1, want.numel() if kwargs.get("reduction", "none") == "none" else x.numel() // classes)
    norm_of_g = g.norm() * {"sum": rows**0.5, "mean": rows**-0.5}.get(kwargs.get("reduction"), 1.0)
    subnormal = 2.0**-25 * x.numel() ** 0.5 if x.dtype == torch.float16 else 0.0
    allowed = TOLERANCE[x.dtype] * max(want_grad.norm(), 0.3 * norm_of_g * weight) + subnormal
    assert (grad.double() - want_grad).norm() <= allowed


def cross_entropy_property(data):
    x, generator = data.draw(tensors())
    classes = x.shape[min(1, x.dim() - 1)]
    rows = [x.shape[0], *x.shape[2:]] if x.dim() > 1 else []
    kwargs = {
        "reduction": data.draw(st.sampled_from(["none", "mean", "sum"])),
        "label_smoothing": data.draw(st.sampled_from([0.0, 0.0, 0.1, 1.0])),
        "z_loss_weight": data.draw(st.sampled_from([0.0, 0.0, 1e-3])),
        "softcap": data.draw(st.sampled_from([None, None, 4.0])),
        "temperature": data.draw(st.sampled_from([1.0, 1.0, 0.5, 3.0])),
    }
    if data.draw(st.booleans()):
        target = torch.randint(0, classes, rows, generator=generator)
        if target.dim() > 0:
            target.view(-1)[: data.draw(st.integers(0, target.numel()))] = -100
        target = target.to(data.draw(st.sampled_from([torch.int64, torch.int32])))
    else:
        target = torch.randn(x.shape, generator=generator).softmax(min(1, x.dim() - 1)).to(x.dtype)
    weight = torch.rand(classes, generator=generator) + 0.1 if data.draw(st.booleans()) else None
    check(
        tse.cross_entropy,
        REFERENCE["cross_entropy"],
        x,
        generator,
        (target, weight),
        kwargs,
        classes,
        1 / kwargs["temperature"],
    )


def sparsemax_property(data):
    x, generator = data.draw(tensors())
    dim = data.draw(st.integers(-x.dim(), x.dim() - 1))
    spec = next(s for s in SPECS if s.name == "sparsemax")
    check(tse.sparsemax, spec.reference, x, generator, (dim,), {}, where=spec.differentiable(x.double(), dim))


def hold(property, examples):
    """The same examples in every run; --hypothesis-seed explores others with derandomize off."""
    settings(max_examples=examples, deadline=None, derandomize=True)(given(data=st.data())(property))()


several = pytest.mark.parametrize("examples", [300, pytest.param(3000, marks=pytest.mark.full)])


@several
def test_cross_entropy(examples):
    hold(cross_entropy_property, examples)


@several
def test_sparsemax(examples):
    hold(sparsemax_property, examples)


# ---- calls that torch refuses -------------------------------------------------------------------------------------


def random_call(r):
    """Arguments, some of which do not fit."""
    n, c = r.choice([(0, 4), (1, 1), (3, 5), (4, 7)])
    shape = r.choice([(n, c), (n, c), (c,), (n, c, 2), (), (n, c, 2, 3)])
    x = torch.randn(shape).to(r.choice([torch.float32, torch.float32, torch.bfloat16, torch.float64, torch.int64]))
    fitting = (*shape[:1], *shape[2:]) if len(shape) > 1 else ()
    rows = r.choice([fitting] * 6 + [(n,), (n, 2), (), (n + 1,), (1,), (n, 2, 3), shape])
    if r.random() < 0.3:
        target = torch.rand(r.choice([shape, rows])).to(x.dtype if x.is_floating_point() else torch.float32)
    else:
        target = torch.randint(-2 if r.random() < 0.2 else 0, max(1, c) + (r.random() < 0.2), rows)
        target = target.to(r.choice([torch.int64] * 6 + [torch.int16, torch.bool]))
    kwargs = {}
    if r.random() < 0.3:
        size = r.choice([c, c, c + 1, 0])
        kwargs["weight"] = torch.rand(r.choice([(size,), (size, 1)])).to(
            r.choice([x.dtype, torch.float32, torch.int64])
        )
    if r.random() < 0.2:
        kwargs["label_smoothing"] = r.choice([0.0, 0.1, 1.0, 1.5, "much"])
    if r.random() < 0.2:
        kwargs["ignore_index"] = r.choice([-100, 0, 2, 2**40, None, 1.5])
    if r.random() < 0.2:
        kwargs["reduction"] = r.choice(["none", "sum", "mean", "average", None, 3])
    return r.choice([x] * 9 + [None, [1.0]]), r.choice([target] * 9 + [None, 3]), kwargs


def outcome(function, x, target, kwargs):
    try:
        y = function(x, target, **kwargs)
        if torch.is_tensor(x) and x.requires_grad:
            y.sum().backward()
        return y
    except Exception as error:
        return error


# Not compared: torch refuses weights of another precision than the logits, and a target of shape (1) in backward.
@pytest.mark.parametrize("calls", [2000, pytest.param(20000, marks=pytest.mark.full)])
def test_bad_arguments_raise_where_torch_raises(calls):
    r = random.Random(0)
    torch.manual_seed(0)
    raised = agreed = 0
    for i in range(calls):
        x, target, kwargs = random_call(r)
        if torch.is_tensor(x) and x.is_floating_point() and r.random() < 0.5:
            x.requires_grad_()
        torchs = outcome(F.cross_entropy, x, target, kwargs)
        ours = outcome(tse.cross_entropy, x, target, kwargs)
        call = (i, x if not torch.is_tensor(x) else (x.shape, x.dtype), target, kwargs, torchs, ours)
        if not isinstance(torchs, Exception):
            if torch.is_tensor(x) and not x.is_floating_point():
                continue  # torch checks nothing if there are no elements
            if "weight" in kwargs and kwargs["weight"].dim() != 1:
                continue  # nor the shape of weights for images
            assert not isinstance(ours, Exception), call
            torch.testing.assert_close(ours.double(), torchs.double(), rtol=2e-2, atol=2e-2, equal_nan=True)
            agreed += 1
            continue
        raised += 1
        weight = kwargs.get("weight")
        wider = weight is not None and "expected scalar type" in str(torchs) and weight.is_floating_point()
        one_row = torch.is_tensor(x) and x.dim() == 1 and torch.is_tensor(target) and target.shape == (1,)
        wider = wider or one_row
        assert isinstance(ours, Exception) or wider, call
        if isinstance(ours, Exception):
            assert str(ours).startswith("cross_entropy: "), call
    assert raised > calls / 4
    assert agreed > calls / 14


@pytest.mark.parametrize("dim", [2, -3, 1.0, None, "last"], ids=str)
def test_bad_dimensions_of_sparsemax(dim):
    with pytest.raises((IndexError, TypeError), match="sparsemax: dim: expected"):
        tse.sparsemax(torch.zeros(2, 3), dim)
