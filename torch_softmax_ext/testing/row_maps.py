"""Samples and errors that the specifications of row maps share."""

import functools

import torch

from torch_softmax_ext.testing.spec import Random, Sample, error_case

_INF = float("inf")


def row_map_samples(device, dtype):
    """Shapes, strides, and rows with infinities and NaN."""
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


def row_map_errors(op):
    error = functools.partial(error_case, op)
    x = torch.zeros(2, 3)
    yield error("dim", IndexError, r"dim: expected a dimension in \[-2, 1\].* got 2", x, 2)
    yield error("dim-negative", IndexError, r"dim: .* got -3", x, -3)
    yield error("integer", NotImplementedError, r"input: expected float32.* got Long", x.long())
    yield error("float-dim", TypeError, r"dim: expected int", x, 1.0)
    yield error("complex", NotImplementedError, r"input: expected float32.* got ComplexFloat", x + 0j)
