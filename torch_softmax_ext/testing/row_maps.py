"""Samples, references and errors that the specifications of row maps share."""

import dataclasses
import functools

import torch

from torch_softmax_ext.testing.spec import Random, Sample, error_case

_INF = float("inf")


def prepared(input, dim, temperature=1.0, mask=None, dtype=None):
    """The logits that a map sees, at least as wide as the result."""
    s = input if dtype is None else input.to(torch.promote_types(input.dtype, dtype))
    if mask is not None and mask.dtype == torch.bool:
        s = torch.where(mask, s, -_INF)
    if s.numel() > 0:  # maps do not change where all of a row is shifted; what is finite stays finite
        s = s - s.detach().nan_to_num(nan=-_INF, posinf=0, neginf=-_INF).amax(dim, keepdim=True).nan_to_num(neginf=0)
    s = s / temperature
    return s if mask is None or mask.dtype == torch.bool else s + mask


def reference(core, masked=0.0):
    """A reference of a map, of ``core(logits, dim)`` for rows that are not ``-inf`` alone; those become ``masked``."""

    def of_map(input, dim=-1, *, temperature=1.0, mask=None, dtype=None, **options):
        s = prepared(input, dim, temperature, mask, dtype)
        if s.numel() == 0:
            return s.clone()
        is_masked = (s == -_INF).all(dim, keepdim=True)
        return torch.where(is_masked, masked, core(torch.where(is_masked, 0, s), dim, **options))

    return of_map


def in_float32(of_map):
    """The same for half types: computed in float32, and rounded. A yardstick where torch has no such function."""

    def rounded(input, *args, **options):
        return of_map(input.to(torch.promote_types(input.dtype, torch.float32)), *args, **options).to(input.dtype)

    return rounded


def by_keyword(samples, **options):
    """The same samples with ``dim`` by keyword, as in ``entmax(input, alpha, dim)``, and further keywords."""
    for s in samples:
        dim = {"dim": s.args[0]} if s.args else {}
        yield dataclasses.replace(s, args=(), kwargs={**dim, **s.kwargs, **options})


def row_map_samples(device, dtype):
    """Shapes, strides, rows with infinities and NaN, and options."""
    logits = Random(device, dtype).normal
    yield Sample("2d", logits(7, 10), small=True)
    yield Sample("2d-dim0", logits(7, 10), (0,), small=True)
    yield Sample("1d", logits(9), small=True)
    yield Sample("scalar", logits(), small=True)
    yield Sample("3d-middle", logits(3, 4, 5), (1,), small=True)
    yield Sample("4d", logits(2, 3, 4, 5), (-2,), small=True)
    yield Sample("keyword", logits(3, 8), (), {"dim": 0}, small=True)
    yield Sample("one-element", logits(4, 1), small=True)
    yield Sample("no-rows", logits(0, 5))
    yield Sample("no-elements", logits(3, 0))
    yield Sample("attention", logits(2, 3, 16, 64))

    yield Sample("channels-last", logits(2, 6, 3, 5).to(memory_format=torch.channels_last), (1,))
    yield Sample("transposed", logits(12, 40).t())
    yield Sample("every-other", logits(7, 20)[:, ::2])
    yield Sample("every-other-row", logits(14, 33)[::2])
    yield Sample("expanded-rows", logits(1, 33).expand(7, 33))
    yield Sample("expanded-elements", logits(7, 1).expand(7, 5))
    yield Sample("permuted", logits(3, 5, 2, 4).permute(2, 1, 3, 0), (1,))
    yield Sample("misaligned", logits(5 * 37 + 1)[1:].view(5, 37))
    yield Sample("all-equal", torch.full((3, 300), 3e4, dtype=dtype, device=device))
    holes = logits(4, 40)
    holes[:, ::3] = -_INF
    yield Sample("minus-inf", holes)
    masked = logits(3, 40)
    masked[1] = -_INF
    yield Sample("masked-row", masked)
    for n in (100, 5000):
        masked = logits(3, n)
        masked[1] = -_INF
        yield Sample(f"masked-row-of-{n}", masked)
    broken = logits(4, 600)
    broken[0, 500] = float("nan")
    broken[2, 3] = _INF
    yield Sample("nan-inf", broken, finite=False)
    for n in (3000, 5000):
        late = logits(4, n)
        late[0, n - 100] = float("nan")
        late[1, n - 1000] = _INF
        late[2, : n - 1000] = -_INF
        yield Sample(f"late-nan-inf-{n}", late, finite=False)
    yield from _option_samples(device, dtype)


def _option_samples(device, dtype):
    """Temperatures, masks and dtypes."""
    random = Random(device, dtype, seed=2)
    logits = random.normal

    def mask(*shape):
        return random.uniform(*shape) < 0.7

    yield Sample("temperature", logits(7, 10), (), {"temperature": 0.6}, small=True)
    yield Sample("boolean-mask", logits(2, 3, 4, 6), (), {"mask": mask(2, 1, 1, 6)}, small=True)
    yield Sample("added-mask", logits(2, 3, 4, 6), (), {"mask": logits(3, 1, 6), "temperature": 2.0}, small=True)
    yield Sample("mask-of-dim0", logits(6, 5), (0,), {"mask": mask(6, 5)}, small=True)
    yield Sample("dtype", logits(3, 9), (), {"dtype": torch.float64}, small=True)
    wider = torch.promote_types(dtype, torch.float32)
    yield Sample("float32", logits(3, 300), (), {"dtype": wider})
    yield Sample("float32-columns", logits(3, 30, 40), (1,), {"dtype": wider})
    yield Sample("row-temperatures", logits(4, 3, 33), (), {"temperature": 0.5 + random.uniform(3, 1)})
    yield Sample("one-temperature", logits(4, 300), (), {"temperature": torch.tensor(1.5)})
    yield Sample("causal", logits(2, 2, 70, 70), (), {"mask": torch.ones(70, 70, device=device).tril().bool()})
    yield Sample("padding", logits(3, 2, 5, 600), (), {"mask": mask(3, 1, 1, 600), "temperature": 3.0})
    yield Sample(
        "mask-along-dim", logits(4, 33), (), {"mask": torch.tensor([[True], [False], [True], [True]]).to(device)}
    )
    yield Sample("mask-with-strides", logits(8, 33), (), {"mask": mask(33, 8).t()})
    yield Sample("added-with-strides", logits(5, 260), (), {"mask": logits(260, 5).t()})
    yield Sample("masked-columns", logits(2, 40, 3, 5), (1,), {"mask": mask(40, 3, 1), "temperature": 0.7})
    yield Sample("long-masked", logits(2, 70000), (), {"mask": mask(70000)})
    broken = logits(3, 40)
    broken[:, 7] = float("nan")
    broken[1, 9] = _INF
    kept = torch.arange(40, device=device) != 7
    yield Sample("masked-nan", broken[:1], (), {"mask": kept, "temperature": 0.5})
    yield Sample("inf-beside-masked-nan", broken, (), {"mask": kept}, finite=False)
    nothing = mask(4, 300)
    nothing[2] = False
    yield Sample("masked-row-by-mask", logits(4, 300), (), {"mask": nothing})
    low = torch.zeros(3, 40, dtype=dtype, device=device).masked_fill(mask(3, 40), torch.finfo(dtype).min)
    yield Sample("large-finite-mask", logits(3, 40), (), {"mask": low})
    largest = logits(2, 40)
    largest[:, ::9] = torch.finfo(dtype).max
    yield Sample("largest-over-temperature", largest, (), {"temperature": 0.25})
    axes = [2 - d % 2 for d in range(9)]  # every second one is broadcast
    yield Sample("mask-of-many-dimensions", logits(*[2] * 9, 3), (), {"mask": mask(*axes, 3)})


def row_map_errors(op):
    error = functools.partial(error_case, op)
    x = torch.zeros(2, 3)
    yield error("dim", IndexError, r"dim: expected a dimension in \[-2, 1\].* got 2", x, dim=2)
    yield error("dim-negative", IndexError, r"dim: .* got -3", x, dim=-3)
    yield error("temperature", ValueError, r"temperature: expected a positive number, got 0", x, temperature=0.0)
    yield error("temperature-type", TypeError, r"temperature: expected float or Tensor, got str", x, temperature="1")
    wrong = torch.ones(2, 3)
    yield error("temperatures", RuntimeError, r"temperature: expected a number for each row", x, temperature=wrong)
    yield error("mask-shape", RuntimeError, r"mask: expected a shape that broadcasts", x, mask=wrong[:, :2] > 0)
    yield error("mask-dimensions", RuntimeError, r"mask: expected a shape that broadcasts", x, mask=wrong[None] > 0)
    yield error(
        "mask-dtype", RuntimeError, r"mask: expected a boolean or floating-point mask, got Long", x, mask=wrong.long()
    )
    yield error("dtype", NotImplementedError, r"dtype: expected float32.* got Long", x, dtype=torch.int64)
    yield error("dtype-type", TypeError, r"dtype: expected dtype or None, got int", x, dtype=3)
    yield error("integer", NotImplementedError, r"input: expected float32.* got Long", x.long())
    yield error("float-dim", TypeError, r"dim: expected int", x, dim=1.0)
    yield error("complex", NotImplementedError, r"input: expected float32.* got ComplexFloat", x + 0j)
