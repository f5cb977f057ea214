"""Private operators check their arguments: shape, dtype and device of every tensor, the range of every index."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

ops = torch.ops.torch_softmax_ext
OPTIONS = {
    "plain": (None, -100, "mean", 0.0, 0.0, None, 1.0),
    "none": (None, -100, "none", 0.0, 0.0, None, 1.0),
    "smoothing": (None, -100, "sum", 0.1, 0.1, 5.0, 0.5),
}

ENTMAX_LOSS = (-100, "none", 1.3, None)


def cross_entropy(device, options, dtype=torch.float32, probabilities=False, lse=True):
    x = torch.randn(6, 5, device=device, dtype=dtype)
    target = torch.randint(0, 5, (6,), device=device)
    if probabilities:
        target = torch.rand(6, 5, device=device, dtype=dtype)
    loss, stats = ops._cross_entropy_forward(x, target, *options)
    return [torch.ones_like(loss), torch.randn(6, device=device).to(loss.dtype) if lse else None, x, target, stats]


def selective(device, k, entropy):
    x = torch.randn(6, 5, device=device)
    index = torch.randint(0, 5, (6, *k), device=device)
    logp, h, stats = ops._selective_log_softmax_forward(x, index, entropy, 1.0, None)
    return [torch.ones_like(logp), torch.ones_like(h) if entropy else None, x, index, stats]


def entmax_loss(device):
    x, target = torch.randn(6, 5, device=device), torch.randint(0, 5, (6,), device=device)
    loss, stats = ops._entmax_loss_forward(x, target, *ENTMAX_LOSS)
    return [torch.ones_like(loss), x, target, stats]


def linear(device):
    def normal(*shape):
        return torch.randn(shape, device=device)

    return [normal(6), normal(6, 4), normal(5, 4), torch.randint(0, 5, (6,), device=device), normal(5), normal(5)]


@dataclass
class Call:
    """A call of a private operator that fits: `function(*tensors)`."""

    name: str
    arguments: str  # names of the tensors
    tensors: list
    function: Callable
    any_dtype: str = ""  # names of tensors that may also have another floating dtype


def calls(device):
    for name, options in OPTIONS.items():
        for kind in ("indices", "probabilities"):
            for dtype in (torch.float32, torch.float64, torch.bfloat16):
                yield Call(
                    f"cross_entropy-{name}-{kind}-{dtype}",
                    "grad_output grad_lse input target stats",
                    cross_entropy(device, options, dtype, kind == "probabilities"),
                    lambda *t, options=options: ops._cross_entropy_backward(*t, *options),
                    any_dtype="input" if kind == "indices" else "",  # float32 and half types have the same statistics
                )
    for forward in (ops._cross_entropy_forward, ops._cross_entropy_metrics_forward):
        yield Call(
            forward.__name__,
            "input target",
            cross_entropy(device, OPTIONS["none"])[2:4],
            lambda *t, forward=forward: forward(*t, *OPTIONS["none"]),
            any_dtype="input",
        )
    for k, entropy in (((), False), ((3,), True)):
        yield Call(
            "selective-entropy" if entropy else "selective",
            "grad_logp grad_entropy input index stats",
            selective(device, k, entropy),
            lambda *t: ops._selective_log_softmax_backward(*t, 1.0, None),
            any_dtype="input",
        )
    yield Call(
        "entmax_loss",
        "grad_output input target stats",
        entmax_loss(device),
        lambda *t: ops._entmax_loss_backward(*t, *ENTMAX_LOSS),
        any_dtype="input",
    )
    yield Call(
        "sparsemax",
        "grad_output output",
        [torch.ones(6, 5, device=device), torch.randn(6, 5, device=device).softmax(1)],
        lambda *t: ops._sparsemax_backward(*t, 1, None, None, 1.0, None),
    )
    yield Call(
        "linear",
        "grad_output input linear_weight target linear_bias weight",
        linear(device),
        lambda *t: ops._linear_cross_entropy_backward(*t, -100, "none", 0.0, 0.0, None, 1.0, None, True, True, True),
        any_dtype="weight",
    )


def changes(t):
    """Tensors that do not fit in the place of `t`."""
    flat = t.flatten()
    yield "short", flat[: t.numel() // 2].clone()
    yield "long", torch.cat([flat, flat])
    yield "unsqueezed", t[None]
    yield "empty", flat[:0]
    yield "dtype", t.to(torch.float16 if t.dtype != torch.float16 else torch.float32)
    yield "complex", t.to(torch.complex64)
    yield "meta", t.to("meta")
    if not t.is_floating_point():
        for value in (5, -1, 10**12, -(10**12)):
            yield f"class {value}", torch.full_like(t, value)


def check_refusals(call, tensors, is_checked):
    """Every change of every tensor raises, but those that fit or for which is_checked(change) is False."""
    for i, (argument, tensor) in enumerate(zip(call.arguments.split(), tensors, strict=True)):
        for change, other in changes(tensor) if tensor is not None else ():
            if (change == "dtype" and argument in call.any_dtype.split()) or not is_checked(change):
                continue
            with pytest.raises(
                (RuntimeError, IndexError, NotImplementedError, ValueError), match=r"\w+: \w+: expected"
            ):
                pytest.fail(f"{argument}: {change}: {call.function(*tensors[:i], other, *tensors[i + 1 :])}")


names = pytest.mark.parametrize("name", [call.name for call in calls("cpu")])


@names
def test_a_tensor_that_does_not_fit_is_refused(name, device):
    call = next(c for c in calls(device) if c.name == name)
    call.function(*call.tensors)
    # On CUDA a class out of range is a device-side assertion.
    check_refusals(call, call.tensors, lambda change: device.type == "cpu" or not change.startswith("class"))


@names
def test_meta_tensors_have_the_same_checks(name):
    """Those that fit give the shapes of the gradients; the others are refused."""
    call = next(c for c in calls("cpu") if c.name == name)
    meta = [t if t is None else t.to("meta") for t in call.tensors]
    want, got = call.function(*call.tensors), call.function(*meta)
    for a, b in zip(*((r,) if isinstance(r, torch.Tensor) else r for r in (got, want)), strict=True):
        assert (a.shape, a.dtype, a.device.type) == (b.shape, b.dtype, "meta")
    check_refusals(call, meta, lambda change: change != "meta" and not change.startswith("class"))


def test_statistics_of_any_strides(device):
    grad, lse, x, target, stats = cross_entropy(device, OPTIONS["none"])
    want = ops._cross_entropy_backward(grad, lse, x, target, stats, *OPTIONS["none"])
    strided = stats.repeat_interleave(2)[::2]
    assert torch.equal(ops._cross_entropy_backward(grad, lse, x, target, strided, *OPTIONS["none"]), want)
    grad, lse, x, index, stats = selective(device, (3,), True)
    want = ops._selective_log_softmax_backward(grad, lse, x, index, stats, 1.0, None)
    strided = stats.t().contiguous().t()
    assert torch.equal(ops._selective_log_softmax_backward(grad, lse, x, index, strided, 1.0, None), want)
    grad, x, target, stats = entmax_loss(device)
    want = ops._entmax_loss_backward(grad, x, target, stats, *ENTMAX_LOSS)
    strided = stats.t().contiguous().t()
    assert torch.equal(ops._entmax_loss_backward(grad, x, target, strided, *ENTMAX_LOSS), want)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({4: float("nan")}, "z_loss_weight"),
        ({5: -1.0}, "softcap"),
        ({6: 0.0}, "temperature"),
        ({2: "avg"}, "reduction"),
        ({0: torch.ones(3)}, "weight"),
    ],
    ids=str,
)
def test_wrong_options_of_backward_are_refused(device, options, match):
    tensors = cross_entropy(device, OPTIONS["none"])
    o = list(OPTIONS["none"])
    for i, value in options.items():
        o[i] = value.to(device) if isinstance(value, torch.Tensor) else value
    with pytest.raises((RuntimeError, ValueError), match=f"cross_entropy: {match}: expected"):
        ops._cross_entropy_backward(*tensors, *o)


@pytest.mark.on_host  # on a GPU a device-side assertion ends all work
@pytest.mark.parametrize("bad", [-1, 50, 2**40])
@pytest.mark.parametrize("classes_first", [False, True])
def test_backward_on_cuda_checks_classes(bad, classes_first):
    x = torch.randn(50, 4).t() if classes_first else torch.randn(4, 50)
    good, target = torch.zeros(4, dtype=torch.long), torch.tensor([0, 1, bad, 2])
    options = (None, -100, "mean", 0.0, 0.0, None, 1.0)
    _, stats = ops._cross_entropy_forward(x, good, *options)
    with pytest.raises(RuntimeError, match="cross_entropy: target: expected a class index"):
        ops._cross_entropy_backward(torch.ones(()), None, x, target, stats, *options)
    _, _, stats = ops._selective_log_softmax_forward(x, good, False, 1.0, None)
    with pytest.raises(RuntimeError, match="selective_log_softmax: index: expected a class"):
        ops._selective_log_softmax_backward(torch.ones(4), None, x, target, stats, 1.0, None)
    loss, stats = ops._entmax_loss_forward(x, good, *ENTMAX_LOSS)
    with pytest.raises(RuntimeError, match="entmax_loss: target: expected a class index"):
        ops._entmax_loss_backward(torch.ones_like(loss), x, target, stats, *ENTMAX_LOSS)
