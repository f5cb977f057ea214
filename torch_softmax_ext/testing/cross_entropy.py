"""Specification of cross_entropy. What benchmarks measure of it is in cross_entropy_bench.py."""

import functools

import torch
import torch.nn.functional as F

import torch_softmax_ext as tse
from torch_softmax_ext.testing.cross_entropy_bench import BENCH
from torch_softmax_ext.testing.spec import OpSpec, Random, Sample, error_case

_INF = float("inf")
_REDUCTIONS = ("none", "mean", "sum")
_NONE = {"reduction": "none"}
_SMOOTHING = {"label_smoothing": 0.1}
_ALL = {"label_smoothing": 0.2, "z_loss_weight": 0.1, "softcap": 5.0, "temperature": 0.7}


def transform(input, softcap=None, temperature=1.0):
    """The logits after softcap and temperature."""
    s = input if softcap is None else softcap * torch.tanh(input / softcap)
    return s / temperature


def _z_loss(s, target, *, ignore_index, reduction, z_loss_weight):
    """The z-loss, the log-sum-exp with 0 in ignored rows, and which rows are counted."""
    lse = s.logsumexp(0 if s.dim() == 1 else 1)
    counted = torch.ones_like(lse, dtype=torch.bool) if target.is_floating_point() else target != ignore_index
    lse = torch.where(counted, lse, torch.zeros_like(lse))
    z_loss = z_loss_weight * lse**2
    if reduction != "none":
        z_loss = z_loss.sum() / (counted.sum() if reduction == "mean" else 1)
    return z_loss, lse, counted


def _reference(
    input, target, weight=None, *, reduction="mean", z_loss_weight=0.0, softcap=None, temperature=1.0, **kwargs
):
    """F.cross_entropy of the transformed logits, plus the z-loss."""
    s = transform(input, softcap, temperature)
    indices = not target.is_floating_point()
    t = target.long() if indices else target.to(input.dtype)
    if indices and input.dim() == 1:  # torch's own backward does not accept a target of shape (1) here
        t = t.reshape(())
    weight = weight if weight is None else weight.to(input.dtype)
    loss = F.cross_entropy(s, t, weight, reduction=reduction, **kwargs)
    if z_loss_weight == 0:
        return loss
    ignore_index = kwargs.get("ignore_index", -100)
    return loss + _z_loss(s, t, ignore_index=ignore_index, reduction=reduction, z_loss_weight=z_loss_weight)[0]


def reference_with_metrics(input, target, weight=None, *, reduction="mean", z_loss_weight=0.0, **kwargs):
    """loss, z_loss, lse, accuracy and predictions of cross_entropy_with_metrics for logits (N, C, …)."""
    loss = _reference(input, target, weight, reduction=reduction, z_loss_weight=z_loss_weight, **kwargs)
    s = transform(input, kwargs.get("softcap"), kwargs.get("temperature", 1.0))
    z_loss, lse, counted = _z_loss(s, target, ignore_index=-100, reduction=reduction, z_loss_weight=z_loss_weight)
    predictions = input.argmax(1)
    right = predictions == (target.argmax(1) if target.is_floating_point() else target)
    accuracy = (right & counted).sum() / counted.sum()
    return loss, z_loss, lse, accuracy.float(), torch.where(counted, predictions, -100)


def _torch_op(input, target, *args, **kwargs):
    """In fp32 for half types: torch rounds their loss to three digits, ours is fp32."""
    return _reference(input if input.dtype == torch.float64 else input.float(), target, *args, **kwargs)


def _weight(r, classes):
    return r.uniform(classes) + 0.5


def _option_samples(r):
    """Each reduction with each option."""
    y = functools.partial(r.classes, 9, 6, ignored=2)
    for reduction in _REDUCTIONS:
        o = {"reduction": reduction}
        yield Sample(f"2d-{reduction}", r.normal(7, 10, scale=3), (r.classes(10, 7),), o, small=True)
        yield Sample(f"ignored-{reduction}", r.normal(6, 9, scale=3), (y(),), o, small=True)
        yield Sample(f"1d-{reduction}", r.normal(5, scale=3), (r.classes(5),), o, small=True)
        yield Sample(f"smoothing-{reduction}", r.normal(6, 9, scale=3), (y(),), {**o, **_SMOOTHING}, small=True)
        yield Sample(f"weight-{reduction}", r.normal(6, 9, scale=3), (y(), _weight(r, 9)), o, small=True)
        yield Sample(
            f"probabilities-{reduction}", r.normal(5, 8, scale=3), (r.probabilities(5, 8, dim=1),), o, small=True
        )
        yield Sample(f"z-loss-{reduction}", r.normal(6, 9, scale=3), (y(),), {**o, "z_loss_weight": 0.1}, small=True)
        for kind, target in (("", r.classes(9, 2, 4, ignored=2)), ("-probabilities", r.probabilities(2, 9, 4, dim=1))):
            x = r.normal(2, 9, 4, scale=3)
            yield Sample(f"all-options{kind}-{reduction}", x, (target, _weight(r, 9)), {**o, **_ALL}, small=True)
    yield Sample("softcap", r.normal(4, 30, scale=30), (r.classes(30, 4),), {"softcap": 20.0}, small=True)
    yield Sample("temperature", r.normal(4, 30, scale=3), (r.classes(30, 4),), {"temperature": 0.1}, small=True)
    yield Sample(
        "smoothing-of-one", r.normal(4, 30, scale=3), (r.classes(30, 4),), {"label_smoothing": 1.0}, small=True
    )


def _target_samples(r):
    """Kinds of targets, and rows that are few, ignored or missing."""
    x = functools.partial(r.normal, scale=3)
    yield Sample("1d-probabilities", x(8), (r.probabilities(8),), small=True)
    yield Sample("no-rows-probabilities", x(0, 5), (r.probabilities(0, 5),), {"reduction": "sum"})
    yield Sample("1d-target-of-one", x(5), (r.classes(5, 1),), small=True)
    yield Sample("3d", x(3, 4, 5), (r.classes(4, 3, 5),), small=True)
    yield Sample("int32", x(7, 10), (r.classes(10, 7).int(),), small=True)
    yield Sample("uint8", x(7, 10), (r.classes(10, 7).to(torch.uint8),), {"ignore_index": 3}, small=True)
    yield Sample("ignore-index-a-class", x(7, 4), (r.classes(4, 7),), {"ignore_index": 2}, small=True)
    yield Sample("one-class", x(4, 1), (r.classes(1, 4),), _NONE, small=True)
    yield Sample("no-rows-sum", x(0, 5), (r.classes(5, 0),), {"reduction": "sum"})
    yield Sample("no-rows-none", x(0, 5), (r.classes(5, 0),), _NONE)
    yield Sample("no-rows-mean", x(0, 5), (r.classes(5, 0),), finite=False)
    yield Sample("all-ignored-sum", x(3, 5), (r.classes(5, 3, ignored=3),), {"reduction": "sum"})
    yield Sample("all-ignored-mean", x(3, 5), (r.classes(5, 3, ignored=3),), finite=False)


def _layout_samples(r):
    """Images, and strides of every kind."""
    x = functools.partial(r.normal, scale=3)
    last = {"memory_format": torch.channels_last}
    image = (2, 21, 5, 7)
    for reduction in _REDUCTIONS:
        o = {"reduction": reduction}
        y = functools.partial(r.classes, 21, 2, 5, 7, ignored=3)
        yield Sample(f"images-{reduction}", x(*image), (y(),), o)
        yield Sample(f"images-weight-{reduction}", x(*image), (y(), _weight(r, 21)), o)
        without_coefficients = {**o, "z_loss_weight": 0.1, "temperature": 2.0}
        yield Sample(f"images-options-{reduction}", x(*image), (y(), _weight(r, 21)), without_coefficients)
        smoothed = {**o, **_SMOOTHING, "z_loss_weight": 0.1}
        yield Sample(f"images-smoothing-{reduction}", x(*image), (y(), _weight(r, 21)), smoothed)
        probabilities = r.probabilities(2, 9, 5, 7, dim=1)
        yield Sample(
            f"images-probabilities-{reduction}",
            x(2, 9, 5, 7),
            (probabilities, _weight(r, 9)),
            {**o, **_SMOOTHING},
        )
    yield Sample("columns", x(5, 70, 40), (r.classes(70, 5, 40),))
    yield Sample("channels-last", x(2, 6, 3, 5).to(**last), (r.classes(6, 2, 3, 5),))
    yield Sample("transposed", x(12, 40).t(), (r.classes(12, 40),))
    yield Sample("every-other-class", x(7, 20)[:, ::2], (r.classes(10, 7),))
    yield Sample("every-other-row", x(14, 33)[::2], (r.classes(33, 7),))
    yield Sample("expanded-rows", x(1, 33).expand(7, 33), (r.classes(33, 7),))
    yield Sample("expanded-classes", x(7, 1).expand(7, 5), (r.classes(5, 7),))
    yield Sample("expanded-pixels", x(2, 3, 1).expand(2, 3, 4), (r.classes(3, 2, 4),))
    yield Sample("no-pixels", x(2, 5, 4, 0), (r.classes(5, 2, 4, 0),), {"reduction": "sum"})
    yield Sample("permuted", x(3, 5, 2, 4).permute(2, 1, 3, 0), (r.classes(5, 2, 4, 3),))
    yield Sample("misaligned", x(5 * 37 + 1)[1:].view(5, 37), (r.classes(37, 5),), _NONE)
    yield Sample("images-of-many-classes", x(2, 140, 3), (r.classes(140, 2, 3),), _SMOOTHING)
    q = functools.partial(r.probabilities, 2, 9, 5, dim=1)
    yield Sample("images-and-channels-last", x(2, 9, 5, 7), (q(7).to(**last),))
    yield Sample("images-and-every-other-pixel", x(2, 9, 5, 7), (q(14)[..., ::2],))
    yield Sample("channels-last-and-images", x(2, 9, 5, 7).to(**last), (q(7),))


def _size_samples(r):
    """Row lengths around the limits of the kernels."""
    x = functools.partial(r.normal, scale=3)
    yield Sample("wide", x(3, 5000), (r.classes(5000, 3),), _NONE)
    yield Sample("odd-vocabulary", x(3, 50257), (r.classes(50257, 3),))
    yield Sample("llama-vocabulary", r.normal(2, 128256), (r.classes(128256, 2),))
    yield Sample("many-rows", x(3000, 10), (r.classes(10, 3000),))
    yield Sample("wide-smoothing", x(3, 9000), (r.classes(9000, 3), _weight(r, 9000)), _SMOOTHING)
    yield Sample("wide-probabilities", x(2, 9000), (r.probabilities(2, 9000),), {"softcap": 8.0})
    yield Sample("one-wide-row", x(1, 128256), (r.probabilities(1, 128256),), {"z_loss_weight": 1e-3})
    for name, options in (("", {}), ("-options", {**_SMOOTHING, "z_loss_weight": 0.1, "temperature": 0.7})):
        many, y = x(6, 300), r.classes(300, 6, ignored=2)  # more classes than the CPU takes lane by lane
        yield Sample(f"hundreds{name}", many, (y, _weight(r, 300)), options)
        yield Sample(f"hundreds-none{name}", many, (y, _weight(r, 300)), {**options, **_NONE})
        yield Sample(f"hundreds-probabilities{name}", many, (r.probabilities(6, 300), _weight(r, 300)), options)


def _value_samples(r):
    """Certain, tied, offset and masked rows, and rows that are not finite."""
    x = functools.partial(r.normal, scale=3)
    half = r.dtype == torch.float16
    diagonal = torch.arange(6, device=r.device)
    peaky = x(6, 50)
    peaky[diagonal, diagonal] += 60
    yield Sample("peaky", peaky, (diagonal,), _NONE)
    certain = x(6, 300)
    certain[diagonal, diagonal] += 60
    certain[3, 100:] = -_INF
    certain[4] = 1
    yield Sample("certain-of-hundreds", certain, (diagonal,), _NONE)
    yield Sample("tied", torch.ones(4, 17, dtype=r.dtype, device=r.device), (r.classes(17, 4),))
    yield Sample("offset", x(4, 100) + (100 if half else 1e4), (r.classes(100, 4),))
    yield Sample("offset-smoothing", x(4, 5000) + (100 if half else 1e4), (r.classes(5000, 4),), _SMOOTHING)
    late = x(3, 9000)
    late[0, 5000] = 200
    late[1, :600] = -60000 if half else -1e9
    yield Sample("late-maximum-smoothing", late.clone(), (r.classes(9000, 3),), _SMOOTHING)
    late[2, :600] = -_INF
    yield Sample("late-maximum", late, (torch.full((3,), 5000, device=r.device),), _NONE)
    yield Sample("late-maximum-mean", late, (r.classes(9000, 3),))

    holes = x(4, 40)
    holes[:, ::3] = -_INF
    yield Sample("minus-inf", holes, (torch.full((4,), 1, device=r.device),), _NONE)
    impossible = x(3, 40)
    impossible[1, 5] = -_INF
    target = torch.full((3,), 5, device=r.device)
    yield Sample("minus-inf-at-target", impossible, (target,), _NONE, finite=False)
    nothing = x(3, 30)
    nothing[1] = -_INF
    yield Sample("minus-inf-alone", nothing, (r.classes(30, 3),), {**_NONE, "temperature": 2.0}, finite=False)
    for name, n, at, options in (("", 5000, 4900, {}), ("-smoothing", 40, 30, _SMOOTHING)):
        broken = x(5, n)
        broken[0, at], broken[1, 3], broken[2] = float("nan"), _INF, -_INF
        yield Sample(f"nan-inf{name}", broken, (r.classes(n, 5),), {**_NONE, **options}, finite=False)


def _large_logit_samples(r):
    """Finite logits of any size, from masks with large negative numbers or from small temperatures."""
    huge, cold = (2e4, 1e-4) if r.dtype == torch.float16 else (1e30, 1e-9)
    masked = r.normal(2, 9000, scale=3)
    masked[:, :4096] = -huge
    last = r.classes(4096, 2) + 4096
    yield Sample("masked-block", masked, (last,), _NONE)
    yield Sample("masked-block-smoothing", masked, (last,), {**_NONE, **_SMOOTHING})
    yield Sample("masked-row", torch.full_like(r.normal(2, 5000), -huge), (r.classes(5000, 2),), _NONE)
    for shape in ((6, 10), (6, 300), (2, 10, 70), (2, 10, 7), (2, 300, 70)):
        name = "x".join(map(str, shape))
        y = (r.classes(shape[1], *shape[:1], *shape[2:]),)
        large, x = r.normal(*shape, scale=huge), r.normal(*shape, scale=3)
        yield Sample(f"huge-{name}", large, y, _NONE)
        yield Sample(f"huge-masked-{name}", x.masked_fill(r.normal(*shape) > 0, -huge), y, _NONE)
        yield Sample(f"huge-equal-{name}", torch.full_like(x, -huge), y, _NONE)
        yield Sample(f"huge-smoothing-{name}", large, y, {**_NONE, **_SMOOTHING})
        yield Sample(f"huge-softcap-{name}", large, y, {**_NONE, "softcap": huge})
        yield Sample(f"cold-{name}", r.normal(*shape, scale=60), y, {**_NONE, "temperature": cold})
    yield Sample("huge-z-loss", r.normal(6, 10, scale=2e4), (r.classes(10, 6),), {**_NONE, "z_loss_weight": 1e-4})


_SAMPLES = (_option_samples, _target_samples, _layout_samples, _size_samples, _value_samples, _large_logit_samples)


def _samples(device, dtype):
    for seed, samples in enumerate(_SAMPLES):
        yield from samples(Random(device, dtype, seed))


def _errors():
    error = functools.partial(error_case, tse.cross_entropy)
    x, t = torch.zeros(2, 5), torch.tensor([0, 1])
    image, probabilities = torch.zeros(2, 5, 4), torch.zeros(2, 5)
    no_class = torch.tensor([0, 5]), torch.tensor([0, -1])
    yield error("class-too-large", IndexError, r"target: .*\[0, 5\).* got 5 at row 1", x, no_class[0], cpu_only=True)
    yield error("class-negative", IndexError, r"target: .* got -1 at row 1", x, no_class[1], cpu_only=True)
    yield error("batch", ValueError, r"target: expected batch size 3", torch.zeros(3, 5), t)
    yield error("shape", RuntimeError, r"target: expected the shape", image, t)
    yield error("inner-shape", RuntimeError, r"target: expected the shape", image, torch.zeros(2, 3).long())
    yield error("1d", ValueError, r"target: expected one class index", torch.zeros(5), t)
    yield error("scalar", RuntimeError, r"input: .* scalar", torch.zeros(()), torch.tensor(0))
    yield error("integer-logits", NotImplementedError, r"input: expected float32.* got Long", x.long(), t)
    yield error("int16-target", RuntimeError, r"target: expected int64, int32 or uint8.* got Short", x, t.short())
    match = r"target: expected .* class probabilities of input's shape"
    yield error("probabilities-shape", RuntimeError, match, x, torch.zeros(2, 4))
    match = r"ignore_index: expected none .* got 1"
    yield error("probabilities-ignore-index", RuntimeError, match, x, probabilities, ignore_index=1)
    match = r"weight: expected one weight for each of 5 classes, got shape \[4\]"
    yield error("weight-shape", RuntimeError, match, x, t, torch.zeros(4))
    yield error("weight-integer", RuntimeError, r"weight: expected floating point", x, t, torch.zeros(5).long())
    match = r"label_smoothing: expected a number between 0.0 and 1.0, got 1.5"
    yield error("smoothing", RuntimeError, match, x, t, label_smoothing=1.5)
    yield error("temperature", ValueError, r"temperature: expected a positive number, got 0", x, t, temperature=0.0)
    yield error("softcap", ValueError, r"softcap: expected None or a positive number, got -1", x, t, softcap=-1.0)
    yield error("z-loss", ValueError, r"z_loss_weight: expected a finite number", x, t, z_loss_weight=_INF)
    yield error("no-number", TypeError, r"temperature: expected float, got str", x, t, temperature="hot")
    match = r"reduction: expected 'none', 'mean' or 'sum', got 'avg'"
    yield error("reduction", ValueError, match, x, t, reduction="avg")
    yield error("no-reduction", ValueError, r"reduction: expected .* got None", x, t, reduction=None)
    yield error("no-tensor", TypeError, r"input: expected Tensor, got list", [1.0], torch.tensor(0))
    yield error("no-target", TypeError, r"target: expected Tensor, got None", x, None)
    yield error("device", RuntimeError, r"target: expected device .* got meta", x, t.to("meta"))


def _eager(options):
    return _torch_op if options.keys() & {"z_loss_weight", "softcap", "temperature"} else F.cross_entropy


SPEC = OpSpec(
    name="cross_entropy",
    op=tse.cross_entropy,
    module=tse.CrossEntropyLoss,
    reference=_reference,
    torch_op=_torch_op,
    samples=_samples,
    errors=tuple(_errors()),
    rows=lambda x, target: (x[:1], target[:1]),
    row_options={"reduction": "none"},
    general_options={"label_smoothing": 0.1, "softcap": 5.0},
    variants=("cross_entropy_with_metrics",),
    bench_eager=_eager,
    **BENCH,
)
