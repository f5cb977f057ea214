"""Specification of cross_entropy."""

import torch
import torch.nn.functional as F

import torch_softmax_ext as tse
from torch_softmax_ext.testing.cross_entropy_bench import BENCH
from torch_softmax_ext.testing.spec import ErrorCase, OpSpec, Sample

_INF = float("inf")


def _reference(
    input, target, weight=None, *, reduction="mean", z_loss_weight=0.0, softcap=None, temperature=1.0, **kwargs
):
    """F.cross_entropy of the transformed logits, and the z-loss."""
    s = input if softcap is None else softcap * torch.tanh(input / softcap)
    s = s / temperature
    indices = not target.is_floating_point()
    t = target.long() if indices else target.to(input.dtype)
    if indices and input.dim() == 1:  # torch's own backward does not know a target of shape (1) there
        t = t.reshape(())
    weight = weight if weight is None else weight.to(input.dtype)
    loss = F.cross_entropy(s, t, weight, reduction=reduction, **kwargs)
    if z_loss_weight == 0:
        return loss
    lse = s.logsumexp(0 if input.dim() == 1 else 1)
    counted = t != kwargs.get("ignore_index", -100) if indices else torch.ones_like(lse, dtype=torch.bool)
    z_loss = z_loss_weight * torch.where(counted, lse, torch.zeros_like(lse)) ** 2
    if reduction == "none":
        return loss + z_loss
    return loss + z_loss.sum() / (counted.sum() if reduction == "mean" else 1)


def _torch_op(input, target, *args, **kwargs):
    """In fp32 for half types: torch's half loss is rounded to three digits, ours is fp32."""
    return _reference(input if input.dtype == torch.float64 else input.float(), target, *args, **kwargs)


def _samples(device, dtype):
    generator = torch.Generator().manual_seed(0)

    def logits(*shape, scale=3.0):
        return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype).to(device)

    def target(classes, *shape, ignored=0):
        t = torch.randint(0, classes, shape, generator=generator).to(device)
        t.view(-1)[:ignored] = -100
        return t

    def weight(classes):
        return torch.rand(classes, generator=generator, dtype=torch.float64).to(dtype).to(device) + 0.5

    def probabilities(*shape):
        dim = 0 if len(shape) == 1 else 1
        return torch.randn(shape, generator=generator, dtype=torch.float64).softmax(dim).to(dtype).to(device)

    for reduction in ("none", "mean", "sum"):
        kwargs = {"reduction": reduction}
        yield Sample(f"2d-{reduction}", logits(7, 10), (target(10, 7),), kwargs, small=True)
        yield Sample(f"ignored-{reduction}", logits(6, 9), (target(9, 6, ignored=2),), kwargs, small=True)
        yield Sample(f"images-{reduction}", logits(2, 21, 5, 7), (target(21, 2, 5, 7, ignored=3),), kwargs)
        yield Sample(f"1d-{reduction}", logits(5), (target(5),), kwargs, small=True)
        yield Sample(
            f"smoothing-{reduction}",
            logits(6, 9),
            (target(9, 6, ignored=2),),
            {**kwargs, "label_smoothing": 0.1},
            small=True,
        )
        yield Sample(f"weight-{reduction}", logits(6, 9), (target(9, 6, ignored=2), weight(9)), kwargs, small=True)
        yield Sample(f"probabilities-{reduction}", logits(5, 8), (probabilities(5, 8),), kwargs, small=True)
        yield Sample(
            f"z-loss-{reduction}",
            logits(6, 9),
            (target(9, 6, ignored=2),),
            {**kwargs, "z_loss_weight": 0.1},
            small=True,
        )
        yield Sample(
            f"all-options-{reduction}",
            logits(2, 9, 4),
            (target(9, 2, 4, ignored=2), weight(9)),
            {**kwargs, "label_smoothing": 0.2, "z_loss_weight": 0.1, "softcap": 5.0, "temperature": 0.7},
            small=True,
        )
        yield Sample(
            f"all-options-probabilities-{reduction}",
            logits(2, 9, 4),
            (probabilities(2, 9, 4), weight(9)),
            {**kwargs, "label_smoothing": 0.2, "z_loss_weight": 0.1, "softcap": 5.0, "temperature": 0.7},
            small=True,
        )
        yield Sample(
            f"images-weight-{reduction}", logits(2, 21, 5, 7), (target(21, 2, 5, 7, ignored=3), weight(21)), kwargs
        )
        options = {"z_loss_weight": 0.1, "temperature": 2.0}  # that need nothing of each class
        yield Sample(
            f"images-options-{reduction}",
            logits(2, 21, 5, 7),
            (target(21, 2, 5, 7, ignored=3), weight(21)),
            {**kwargs, **options},
        )
    yield Sample("softcap", logits(4, 30, scale=30.0), (target(30, 4),), {"softcap": 20.0}, small=True)
    yield Sample("temperature", logits(4, 30), (target(30, 4),), {"temperature": 0.1}, small=True)
    yield Sample("smoothing-of-one", logits(4, 30), (target(30, 4),), {"label_smoothing": 1.0}, small=True)
    yield Sample("1d-probabilities", logits(8), (probabilities(8),), small=True)
    yield Sample("no-rows-probabilities", logits(0, 5), (probabilities(0, 5),), {"reduction": "sum"})
    yield Sample("wide-smoothing", logits(3, 9000), (target(9000, 3), weight(9000)), {"label_smoothing": 0.1})
    yield Sample("wide-probabilities", logits(2, 9000), (probabilities(2, 9000),), {"softcap": 8.0})
    yield Sample("one-wide-row", logits(1, 128256), (probabilities(1, 128256),), {"z_loss_weight": 1e-3})
    yield Sample(
        "offset-smoothing",
        logits(4, 5000) + (100 if dtype == torch.float16 else 1e4),
        (target(5000, 4),),
        {"label_smoothing": 0.1},
    )
    yield Sample("1d-target-of-one", logits(5), (target(5, 1),), small=True)
    yield Sample("3d", logits(3, 4, 5), (target(4, 3, 5),), small=True)
    yield Sample("int32", logits(7, 10), (target(10, 7).int(),), small=True)
    yield Sample("uint8", logits(7, 10), (target(10, 7).to(torch.uint8),), {"ignore_index": 3}, small=True)
    yield Sample("ignore-index-a-class", logits(7, 4), (target(4, 7),), {"ignore_index": 2}, small=True)
    yield Sample("one-class", logits(4, 1), (target(1, 4),), {"reduction": "none"}, small=True)
    yield Sample("no-rows-sum", logits(0, 5), (target(5, 0),), {"reduction": "sum"})
    yield Sample("no-rows-none", logits(0, 5), (target(5, 0),), {"reduction": "none"})
    yield Sample("no-rows-mean", logits(0, 5), (target(5, 0),), finite=False)
    yield Sample("all-ignored-sum", logits(3, 5), (target(5, 3, ignored=3),), {"reduction": "sum"})
    yield Sample("all-ignored-mean", logits(3, 5), (target(5, 3, ignored=3),), finite=False)

    yield Sample("channels-last", logits(2, 6, 3, 5).to(memory_format=torch.channels_last), (target(6, 2, 3, 5),))
    yield Sample("transposed", logits(12, 40).t(), (target(12, 40),))
    yield Sample("every-other-class", logits(7, 20)[:, ::2], (target(10, 7),))
    yield Sample("every-other-row", logits(14, 33)[::2], (target(33, 7),))
    yield Sample("expanded-rows", logits(1, 33).expand(7, 33), (target(33, 7),))
    yield Sample("expanded-classes", logits(7, 1).expand(7, 5), (target(5, 7),))
    yield Sample("expanded-pixels", logits(2, 3, 1).expand(2, 3, 4), (target(3, 2, 4),))
    yield Sample("no-pixels", logits(2, 5, 4, 0), (target(5, 2, 4, 0),), {"reduction": "sum"})
    yield Sample("permuted", logits(3, 5, 2, 4).permute(2, 1, 3, 0), (target(5, 2, 4, 3),))
    yield Sample("misaligned", logits(5 * 37 + 1)[1:].view(5, 37), (target(37, 5),), {"reduction": "none"})

    yield Sample("wide", logits(3, 5000), (target(5000, 3),), {"reduction": "none"})
    yield Sample("odd-vocabulary", logits(3, 50257), (target(50257, 3),))
    yield Sample("llama-vocabulary", logits(2, 128256, scale=1.0), (target(128256, 2),))
    yield Sample("many-rows", logits(3000, 10), (target(10, 3000),))

    peaky = logits(6, 50)
    peaky[torch.arange(6), torch.arange(6)] += 60
    yield Sample("peaky", peaky, (torch.arange(6, device=device),), {"reduction": "none"})
    yield Sample("tied", torch.ones(4, 17, dtype=dtype, device=device), (target(17, 4),))
    yield Sample("offset", logits(4, 100) + (100 if dtype == torch.float16 else 1e4), (target(100, 4),))
    smoothed = logits(3, 9000)
    smoothed[0, 5000] = 200
    smoothed[1, :600] = -60000 if dtype == torch.float16 else -1e9
    yield Sample("late-maximum-smoothing", smoothed, (target(9000, 3),), {"label_smoothing": 0.1})
    late = logits(3, 9000)
    late[0, 5000] = 200
    late[1, :600] = -60000 if dtype == torch.float16 else -1e9
    late[2, :600] = -_INF
    yield Sample("late-maximum", late, (torch.full((3,), 5000, device=device),), {"reduction": "none"})
    yield Sample("late-maximum-mean", late, (target(9000, 3),))
    holes = logits(4, 40)
    holes[:, ::3] = -_INF
    yield Sample("minus-inf", holes, (torch.full((4,), 1, device=device),), {"reduction": "none"})
    impossible = logits(3, 40)
    impossible[1, 5] = -_INF
    yield Sample(
        "minus-inf-at-target", impossible, (torch.full((3,), 5, device=device),), {"reduction": "none"}, finite=False
    )
    broken = logits(5, 5000)
    broken[0, 4900] = float("nan")
    broken[1, 3] = _INF
    broken[2] = -_INF
    yield Sample("nan-inf", broken, (target(5000, 5),), {"reduction": "none"}, finite=False)
    nothing = logits(3, 30)
    nothing[1] = -_INF
    yield Sample("minus-inf-alone", nothing, (target(30, 3),), {"reduction": "none", "temperature": 2.0}, finite=False)
    for reduction in ("none", "mean", "sum"):
        kwargs = {"reduction": reduction}
        yield Sample(
            f"images-smoothing-{reduction}",
            logits(2, 21, 5, 7),
            (target(21, 2, 5, 7, ignored=3), weight(21)),
            {**kwargs, "label_smoothing": 0.1, "z_loss_weight": 0.1},
        )
        yield Sample(
            f"images-probabilities-{reduction}",
            logits(2, 9, 5, 7),
            (probabilities(2, 9, 5, 7), weight(9)),
            {**kwargs, "label_smoothing": 0.1},
        )
    broken = logits(5, 40)
    broken[0, 30], broken[1, 3], broken[2] = float("nan"), _INF, -_INF
    kwargs = {"label_smoothing": 0.1, "reduction": "none"}
    yield Sample("nan-inf-smoothing", broken, (target(40, 5),), kwargs, finite=False)
    # More classes than the CPU takes lane by lane.
    for name, options in (("", {}), ("-options", {"label_smoothing": 0.1, "z_loss_weight": 0.1, "temperature": 0.7})):
        many, y = logits(6, 300), target(300, 6, ignored=2)
        yield Sample(f"hundreds{name}", many, (y, weight(300)), options)
        yield Sample(f"hundreds-none{name}", many, (y, weight(300)), {**options, "reduction": "none"})
        yield Sample(f"hundreds-probabilities{name}", many, (probabilities(6, 300), weight(300)), options)
    certain = logits(6, 300)
    certain[torch.arange(6), torch.arange(6)] += 60
    certain[3, 100:] = -_INF
    certain[4] = 1
    yield Sample("certain-of-hundreds", certain, (torch.arange(6, device=device),), {"reduction": "none"})
    yield Sample("images-of-many-classes", logits(2, 140, 3), (target(140, 2, 3),), {"label_smoothing": 0.1})
    last = {"memory_format": torch.channels_last}
    yield Sample("images-and-channels-last", logits(2, 9, 5, 7), (probabilities(2, 9, 5, 7).to(**last),))
    yield Sample("images-and-every-other-pixel", logits(2, 9, 5, 7), (probabilities(2, 9, 5, 14)[..., ::2],))
    yield Sample("channels-last-and-images", logits(2, 9, 5, 7).to(**last), (probabilities(2, 9, 5, 7),))

    # Finite logits of any size, as masks by large negative numbers and small temperatures make them.
    huge, cold = (2e4, 1e-4) if dtype == torch.float16 else (1e30, 1e-9)
    kwargs = {"reduction": "none"}
    masked = logits(2, 9000)
    masked[:, :4096] = -huge
    yield Sample("masked-block", masked, (target(4096, 2) + 4096,), kwargs)
    yield Sample("masked-block-smoothing", masked, (target(4096, 2) + 4096,), {**kwargs, "label_smoothing": 0.1})
    yield Sample("masked-row", torch.full_like(logits(2, 5000), -huge), (target(5000, 2),), kwargs)
    for shape in ((6, 10), (6, 300), (2, 10, 70), (2, 10, 7), (2, 300, 70)):
        name = "x".join(map(str, shape))
        y = target(shape[1], *shape[:1], *shape[2:])
        yield Sample(f"huge-{name}", logits(*shape, scale=huge), (y,), kwargs)
        yield Sample(f"huge-masked-{name}", logits(*shape).masked_fill(logits(*shape) > 0, -huge), (y,), kwargs)
        yield Sample(f"huge-equal-{name}", torch.full_like(logits(*shape), -huge), (y,), kwargs)
        yield Sample(f"huge-smoothing-{name}", logits(*shape, scale=huge), (y,), {**kwargs, "label_smoothing": 0.1})
        yield Sample(f"cold-{name}", logits(*shape, scale=60.0), (y,), {**kwargs, "temperature": cold})
        yield Sample(f"huge-softcap-{name}", logits(*shape, scale=huge), (y,), {**kwargs, "softcap": huge})
    yield Sample("huge-z-loss", logits(6, 10, scale=2e4), (target(10, 6),), {**kwargs, "z_loss_weight": 1e-4})


def _x(device, *shape):
    return torch.zeros(shape, device=device)


def _t(device, *values):
    return torch.tensor(values, device=device)


_ERRORS = (
    ErrorCase(
        "class-too-large",
        lambda d: tse.cross_entropy(_x(d, 3, 5), _t(d, 0, 5, 1)),
        IndexError,
        r"target: .*\[0, 5\).* got 5 at row 1",
        cpu_only=True,
    ),
    ErrorCase(
        "class-negative",
        lambda d: tse.cross_entropy(_x(d, 2, 5), _t(d, 0, -1)),
        IndexError,
        r"target: .* got -1 at row 1",
        cpu_only=True,
    ),
    ErrorCase(
        "batch", lambda d: tse.cross_entropy(_x(d, 3, 5), _t(d, 0, 1)), ValueError, r"target: expected batch size 3"
    ),
    ErrorCase(
        "shape", lambda d: tse.cross_entropy(_x(d, 2, 5, 4), _t(d, 0, 1)), RuntimeError, r"target: expected the shape"
    ),
    ErrorCase(
        "inner-shape",
        lambda d: tse.cross_entropy(_x(d, 2, 5, 4), _t(d, 0, 1, 2)[None].expand(2, 3)),
        RuntimeError,
        r"target: expected the shape",
    ),
    ErrorCase(
        "1d", lambda d: tse.cross_entropy(_x(d, 5), _t(d, 0, 1)), ValueError, r"target: expected one class index"
    ),
    ErrorCase(
        "scalar", lambda d: tse.cross_entropy(_x(d), torch.tensor(0, device=d)), RuntimeError, r"input: .* scalar"
    ),
    ErrorCase(
        "integer-logits",
        lambda d: tse.cross_entropy(_x(d, 2, 5).long(), _t(d, 0, 1)),
        NotImplementedError,
        r"input: expected float32.* got Long",
    ),
    ErrorCase(
        "int16-target",
        lambda d: tse.cross_entropy(_x(d, 2, 5), _t(d, 0, 1).short()),
        RuntimeError,
        r"target: expected int64, int32 or uint8.* got Short",
    ),
    ErrorCase(
        "probabilities-shape",
        lambda d: tse.cross_entropy(_x(d, 2, 5), _x(d, 2, 4)),
        RuntimeError,
        r"target: expected .* class probabilities of input's shape",
    ),
    ErrorCase(
        "probabilities-ignore-index",
        lambda d: tse.cross_entropy(_x(d, 2, 5), _x(d, 2, 5), ignore_index=1),
        RuntimeError,
        r"ignore_index: expected none .* got 1",
    ),
    ErrorCase(
        "weight-shape",
        lambda d: tse.cross_entropy(_x(d, 2, 5), _t(d, 0, 1), _x(d, 4)),
        RuntimeError,
        r"weight: expected one weight for each of 5 classes, got shape \[4\]",
    ),
    ErrorCase(
        "weight-integer",
        lambda d: tse.cross_entropy(_x(d, 2, 5), _t(d, 0, 1), _x(d, 5).long()),
        RuntimeError,
        r"weight: expected floating point",
    ),
    ErrorCase(
        "smoothing",
        lambda d: tse.cross_entropy(_x(d, 2, 5), _t(d, 0, 1), label_smoothing=1.5),
        RuntimeError,
        r"label_smoothing: expected a number between 0.0 and 1.0, got 1.5",
    ),
    ErrorCase(
        "temperature",
        lambda d: tse.cross_entropy(_x(d, 2, 5), _t(d, 0, 1), temperature=0.0),
        ValueError,
        r"temperature: expected a positive number, got 0",
    ),
    ErrorCase(
        "softcap",
        lambda d: tse.cross_entropy(_x(d, 2, 5), _t(d, 0, 1), softcap=-1.0),
        ValueError,
        r"softcap: expected None or a positive number, got -1",
    ),
    ErrorCase(
        "z-loss",
        lambda d: tse.cross_entropy(_x(d, 2, 5), _t(d, 0, 1), z_loss_weight=_INF),
        ValueError,
        r"z_loss_weight: expected a finite number",
    ),
    ErrorCase(
        "no-number",
        lambda d: tse.cross_entropy(_x(d, 2, 5), _t(d, 0, 1), temperature="hot"),
        TypeError,
        r"temperature: expected float, got str",
    ),
    ErrorCase(
        "reduction",
        lambda d: tse.cross_entropy(_x(d, 2, 5), _t(d, 0, 1), reduction="avg"),
        ValueError,
        r"reduction: expected 'none', 'mean' or 'sum', got 'avg'",
    ),
    ErrorCase(
        "no-tensor", lambda d: tse.cross_entropy([1.0], _t(d, 0)), TypeError, r"input: expected Tensor, got list"
    ),
    ErrorCase(
        "no-target", lambda d: tse.cross_entropy(_x(d, 2, 5), None), TypeError, r"target: expected Tensor, got None"
    ),
    ErrorCase(
        "no-reduction",
        lambda d: tse.cross_entropy(_x(d, 2, 5), _t(d, 0, 1), reduction=None),
        ValueError,
        r"reduction: expected .* got None",
    ),
    ErrorCase(
        "device",
        lambda d: tse.cross_entropy(_x(d, 2, 5), _t("meta", 0, 1)),
        RuntimeError,
        r"target: expected device .* got meta",
    ),
)


def _eager(options):
    return _torch_op if options.keys() & {"z_loss_weight", "softcap", "temperature"} else F.cross_entropy


SPEC = OpSpec(
    name="cross_entropy",
    op=tse.cross_entropy,
    module=tse.CrossEntropyLoss,
    reference=_reference,
    torch_op=_torch_op,
    samples=_samples,
    errors=_ERRORS,
    rows=lambda x, target: (x[:1], target[:1]),
    variants=("cross_entropy_with_metrics",),
    bench_eager=_eager,
    **BENCH,
)
