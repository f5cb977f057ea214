"""Arguments that torch's own functions accept (uint8 targets, NumPy's numbers, class weights that are differentiated or
batched), the short way from Python, and FLOP counters."""

import inspect
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import reductions
from torch.utils.flop_counter import FlopCounterMode

import torch_softmax_ext as tse
from torch_softmax_ext.testing.cross_entropy import SPEC

close = torch.testing.assert_close
OPTIONS = {"label_smoothing": 0.1, "z_loss_weight": 0.2, "softcap": 5.0, "temperature": 0.7}


def metrics(*args, **options):
    return tse.cross_entropy_with_metrics(*args, **options)[0]


def linear(x, target, weight=None, **options):
    """linear_cross_entropy with the identity as its linear layer."""
    eye = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
    return tse.linear_cross_entropy(x, eye, target, weight=weight, chunk_size=3, **options)


losses = pytest.mark.parametrize(
    "loss", [tse.cross_entropy, metrics, linear], ids=["cross_entropy", "metrics", "linear"]
)


def grads(function, leaves, *args, **options):
    """The result and its gradients."""
    leaves = [t.detach().requires_grad_() for t in leaves]
    y = function(*leaves, *args, **options)
    g = torch.linspace(0.5, 1, y.numel(), dtype=y.dtype, device=y.device).reshape(y.shape)
    return y.detach(), *torch.autograd.grad(y, leaves, g)


# ---- targets -------------------------------------------------------------------------------------------------------


@losses
@reductions
@pytest.mark.parametrize("ignore_index", [-100, 255, 3, 256])
@pytest.mark.parametrize("options", [{}, OPTIONS], ids=["plain", "options"])
def test_uint8_targets(device, loss, reduction, ignore_index, options):
    x = torch.randn(12, 200, device=device)
    target = (torch.arange(12, device=device) * 15).to(torch.uint8)
    target[2] = 3
    if ignore_index == 255:
        target[5] = 255
    o = {**options, "reduction": reduction, "ignore_index": ignore_index}
    close(grads(loss, [x], target, **o), grads(loss, [x], target.long(), **o))
    with torch.no_grad():
        close(loss(x, target, **o), loss(x, target.long(), **o))
        close(torch.func.vmap(lambda x: loss(x, target, **o))(x[None]), loss(x, target, **o)[None])
    if not options:
        close(loss(x, target, **o), F.cross_entropy(x, target, reduction=reduction, ignore_index=ignore_index))


def test_uint8_targets_of_images_and_weights(device):
    x, weight = torch.randn(2, 7, 4, 5, device=device), torch.rand(7, device=device)
    target = torch.randint(0, 7, (2, 4, 5), device=device)
    target[0] = 200
    for function in (tse.cross_entropy, metrics):
        for o in ({}, OPTIONS):
            got = grads(function, [x], target.to(torch.uint8), weight, ignore_index=200, **o)
            close(got, grads(function, [x], target, weight, ignore_index=200, **o))


@losses
def test_a_uint8_target_is_compared_by_value(device, loss):
    """156 is not a class, and not -100, though both have the same bits."""
    x, target = torch.randn(3, 5, device=device), torch.tensor([0, 156, 2], dtype=torch.uint8, device=device)
    if device.type == "cpu":
        with pytest.raises((IndexError, RuntimeError), match=r"156|device-side assertion: cross_entropy: target"):
            loss(x, target)
    close(loss(x, target, ignore_index=156), F.cross_entropy(x, target, ignore_index=156))


# ---- class weights -------------------------------------------------------------------------------------------------


@losses
@reductions
@pytest.mark.parametrize("options", [{}, OPTIONS], ids=["plain", "options"])
def test_class_weights_that_require_grad_with_probabilities(device, loss, reduction, options):
    generator = torch.Generator().manual_seed(1)
    x, q = (torch.randn(4, 5, generator=generator, dtype=torch.float64).to(device) for _ in range(2))
    weight = torch.rand(5, generator=generator, dtype=torch.float64).to(device) + 0.5
    o = {**options, "reduction": reduction}

    close(grads(loss, [x, q.softmax(1), weight], **o), grads(SPEC.reference, [x, q.softmax(1), weight], **o))
    w = weight.requires_grad_()
    (only,) = torch.autograd.grad(loss(x, q.softmax(1), w, **o).sum(), w)
    close(only, torch.autograd.grad(SPEC.reference(x, q.softmax(1), w, **o).sum(), w)[0])
    f = torch.func
    close(
        f.grad(lambda w: loss(x, q.softmax(1), w, **o).sum())(weight.detach()),
        f.grad(lambda w: SPEC.reference(x, q.softmax(1), w, **o).sum())(weight.detach()),
    )
    tangent = f.jvp(lambda w: loss(x, q.softmax(1), w, **o), (weight.detach(),), (weight.detach(),))
    close(tangent, f.jvp(lambda w: SPEC.reference(x, q.softmax(1), w, **o), (weight.detach(),), (weight.detach(),)))


def test_weights_that_require_grad_in_place(device):
    x, q = torch.randn(4, 5, device=device), torch.randn(4, 5, device=device).softmax(1)
    weight = torch.rand(5, device=device)
    want = grads(lambda x, w: F.cross_entropy(x, q, w), [x, weight])
    close(grads(lambda x, w: tse.cross_entropy(x * 1, q, w, inplace_backward=True), [x, weight]), want)


@losses
def test_class_weights_have_no_gradient_with_indices(device, loss):
    x, target = torch.randn(4, 5, device=device), torch.arange(4, device=device)
    weight = torch.ones(5, device=device, requires_grad=True)
    refused = pytest.raises(RuntimeError, match="weight: expected no gradient to be asked for with class indices")
    for logits in (x, x.clone().requires_grad_(), x.clone().requires_grad_() * 1):
        with refused:
            loss(logits, target, weight)
    with refused:
        torch.func.grad(lambda w: loss(x, target, w))(weight.detach())
    with refused:
        tse.cross_entropy(logits, target, weight, inplace_backward=True)
    with torch.no_grad():
        close(loss(x, target, weight), F.cross_entropy(x, target))
        assert torch.equal(loss(x, target, weight), loss(x, target))


@losses
@reductions
@pytest.mark.parametrize("probabilities", [False, True], ids=["indices", "probabilities"])
def test_vmap_over_class_weights(device, loss, reduction, probabilities):
    x, weights = torch.randn(4, 5, device=device), torch.rand(3, 5, device=device)
    target = torch.arange(4, device=device) if not probabilities else torch.rand(4, 5, device=device)
    want = torch.stack([loss(x, target, w, reduction=reduction) for w in weights])
    vmap = torch.func.vmap
    close(vmap(lambda w: loss(x, target, w, reduction=reduction))(weights), want)
    close(vmap(lambda w: loss(x, target, w, reduction=reduction), in_dims=1)(weights.t()), want)
    xs = torch.stack([x, 2 * x, -x])
    want = torch.stack([loss(a, target, w, reduction=reduction) for a, w in zip(xs, weights, strict=True)])
    close(vmap(lambda a, w: loss(a, target, w, reduction=reduction))(xs, weights), want)
    grad = torch.func.grad(lambda a, w: loss(a, target, w, reduction=reduction).sum())
    want = torch.stack([grad(a, w) for a, w in zip(xs, weights, strict=True)])
    close(vmap(grad)(xs, weights), want)


# ---- numbers -------------------------------------------------------------------------------------------------------

FLOATS = {"numpy32": np.float32, "numpy64": np.float64, "numpy0d": np.array, "tensor": torch.tensor}
INTS = {"numpy": np.int64, "numpy32": np.int32, "tensor": torch.tensor}
CALLS = {
    "cross_entropy": lambda **o: tse.cross_entropy(torch.ones(2, 3), torch.tensor([0, 2]), **o),
    "inplace": lambda **o: tse.cross_entropy(
        torch.ones(2, 3, requires_grad=True) * 1, torch.tensor([0, 2]), inplace_backward=True, **o
    ),
    "cross_entropy_with_metrics": lambda **o: metrics(torch.ones(2, 3), torch.tensor([0, 2]), **o),
    "linear_cross_entropy": lambda **o: tse.linear_cross_entropy(
        torch.ones(2, 3), torch.eye(3), torch.tensor([0, 2]), **o
    ),
    "selective_log_softmax": lambda **o: tse.selective_log_softmax(torch.ones(2, 3), torch.tensor([0, 2]), **o),
    "entropy": lambda **o: tse.selective_log_softmax(torch.ones(2, 3), torch.tensor([0, 2]), return_entropy=True, **o)[
        1
    ],
}
NUMBERS = {"label_smoothing": 0.25, "z_loss_weight": 0.5, "softcap": 2.0, "temperature": 4.0}
FUNCTIONS = {"inplace": "cross_entropy", "entropy": "selective_log_softmax"}
PAIRS = [
    (call, name)
    for call in CALLS
    for name in NUMBERS
    if name in inspect.signature(getattr(tse, FUNCTIONS.get(call, call))).parameters
]


@pytest.mark.parametrize(("call", "name"), PAIRS)
@pytest.mark.parametrize("kind", FLOATS)
def test_numbers_of_other_kinds(call, name, kind):
    call = CALLS[call]
    close(call(**{name: FLOATS[kind](NUMBERS[name])}), call(**{name: NUMBERS[name]}))


@pytest.mark.parametrize(("call", "name"), PAIRS)
def test_ints_for_floats(call, name):
    close(CALLS[call](**{name: 1}), CALLS[call](**{name: 1.0}))


@pytest.mark.parametrize("kind", INTS)
def test_whole_numbers_of_other_kinds(kind):
    x, target = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    number = INTS[kind]
    close(tse.cross_entropy(x, target, ignore_index=number(1)), tse.cross_entropy(x, target, ignore_index=1))
    close(linear(x, target, ignore_index=number(1)), tse.cross_entropy(x, target, ignore_index=1))
    close(tse.linear_cross_entropy(x, torch.eye(3), target, chunk_size=number(2)), tse.cross_entropy(x, target))
    close(tse.sparsemax(x, number(0)), tse.sparsemax(x, 0))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", torch.tensor([1.0])),
        ("temperature", torch.tensor(1.0, requires_grad=True)),
        ("temperature", torch.tensor(1j)),
        ("ignore_index", torch.tensor(1.0)),
        ("ignore_index", np.float64(1)),
        ("softcap", "1"),
    ],
    ids=str,
)
def test_other_types_than_numbers_are_refused(name, value):
    with pytest.raises(TypeError, match=f"{name}: expected"):
        tse.cross_entropy(torch.ones(2, 3), torch.tensor([0, 2]), **{name: value})


def test_every_operator_has_a_short_way():
    x, target = torch.randn(2, 3), torch.tensor([0, 2])
    options = (-100, "mean", 0.1, 0.2, 5.0, 2.0)
    named = dict(zip(("ignore_index", "reduction", *NUMBERS), options, strict=True))
    got = tse._C.cross_entropy_with_metrics(x, target, None, *options)
    assert all(torch.equal(*p) for p in zip(got, tse.cross_entropy_with_metrics(x, target, **named), strict=True))
    for chunk_size in (None, 1):
        got = tse._C.linear_cross_entropy(x, torch.eye(3), target, None, None, *options, chunk_size)
        want = tse.linear_cross_entropy(x, torch.eye(3), target, chunk_size=chunk_size, **named)
        assert torch.equal(got, want)
    got = tse._C.selective_log_softmax_with_entropy(x, target, 2.0, 5.0)
    want = tse.selective_log_softmax(x, target, temperature=2.0, softcap=5.0, return_entropy=True)
    assert all(torch.equal(*p) for p in zip(got, want, strict=True))


def test_the_short_way_takes_ints_and_numpys_float64():
    x, target = torch.randn(2, 3), torch.tensor([0, 2])
    for two in (2, np.float64(2)):
        got = tse._C.cross_entropy(x, target, None, -100, "mean", 0, 0, None, two)
        assert torch.equal(got, tse.cross_entropy(x, target, temperature=2.0))
        assert tse._C.selective_log_softmax(x, target, two, two) is not NotImplemented
    assert tse._C.cross_entropy(x, target, None, -100, "mean", 0, 0, None, 2**70) is NotImplemented


# ---- torch's tools ------------------------------------------------------------------------------------------------


def counted(function, *args, **options):
    with FlopCounterMode(display=False) as counter:
        function(*args, **options)
    return counter.get_total_flops()


@reductions
def test_flop_counters_see_the_products(reduction):
    x, w, target = torch.randn(2, 3, 4), torch.randn(5, 4), torch.zeros(2, 3, dtype=torch.long)
    product = 2 * 6 * 4 * 5
    assert counted(tse.linear_cross_entropy, x, w, target, reduction=reduction) == product

    def step(*wanted):
        leaves = [t.clone().requires_grad_(t is a) for t, a in zip((x, w), wanted, strict=True)]
        tse.linear_cross_entropy(*leaves, target, reduction=reduction).sum().backward()

    again = product if reduction == "none" else 0  # backward computes the logits again
    assert counted(step, x, w) == 3 * product + again
    assert counted(step, x, None) == 2 * product + again


IMPORT = """
import sys
{first}
import torch, torch_softmax_ext as tse
{then}
import torch.utils.flop_counter as f
with f.FlopCounterMode(display=False) as counter:
    tse.linear_cross_entropy(torch.randn(3, 4), torch.randn(5, 4), torch.zeros(3, dtype=torch.long))
assert counter.get_total_flops() == 2 * 3 * 4 * 5
"""


@pytest.mark.parametrize("first", ["", "import torch.utils.flop_counter, torch.distributed.tensor"])
def test_importing_stays_light(first):
    """Importing the package imports no further modules of torch; their rules are registered once they are imported."""
    then = "" if first else "assert not {'torch.utils.flop_counter', 'torch.distributed.tensor'} & set(sys.modules)"
    run = subprocess.run(
        [sys.executable, "-c", IMPORT.format(first=first, then=then)], capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr[-2000:]
