"""Specification of selective_log_softmax. tests/test_selective_log_softmax.py tests the entropy."""

import functools

import torch

import torch_softmax_ext as tse
from torch_softmax_ext.testing.cross_entropy import transform
from torch_softmax_ext.testing.spec import BenchShape, OpSpec, Random, Sample, error_case

_INF = float("inf")


def reference_with_entropy(input, index, *, temperature=1.0, softcap=None):
    """Log-probabilities and entropies in plain torch."""
    logp = transform(input, softcap, temperature).log_softmax(-1)
    entropy = -(logp.exp() * logp.masked_fill(logp == -_INF, 0)).sum(-1)
    if index.dim() == input.dim():
        return logp.gather(-1, index.long()), entropy
    return logp.gather(-1, index.long().unsqueeze(-1)).squeeze(-1), entropy


def _reference(*args, **kwargs):
    return reference_with_entropy(*args, **kwargs)[0]


def _torch_op(input, index, **kwargs):
    """In fp32 for half types: torch's half log-probabilities are rounded to three digits, ours are fp32."""
    return _reference(input if input.dtype == torch.float64 else input.float(), index, **kwargs)


def _samples(device, dtype):
    r = Random(device, dtype)
    logits, index = functools.partial(r.normal, scale=3), r.classes

    yield Sample("2d", logits(7, 10), (index(10, 7),), small=True)
    yield Sample("2d-several", logits(5, 10), (index(10, 5, 3),), small=True)
    yield Sample("1d", logits(9), (index(9),), small=True)
    yield Sample("1d-several", logits(9), (index(9, 4),), small=True)
    yield Sample("3d", logits(2, 3, 8), (index(8, 2, 3),), small=True)
    yield Sample("3d-several", logits(2, 3, 8), (index(8, 2, 3, 2),), small=True)
    yield Sample("repeated", logits(4, 6), (index(3, 4, 12),), small=True)
    yield Sample("int32", logits(7, 10), (index(10, 7).int(),), small=True)
    yield Sample("temperature", logits(4, 9), (index(9, 4),), {"temperature": 0.7}, small=True)
    yield Sample("softcap", logits(4, 9, scale=10.0), (index(9, 4),), {"softcap": 15.0}, small=True)
    yield Sample("both", logits(4, 9), (index(9, 4, 2),), {"softcap": 5.0, "temperature": 2.0}, small=True)
    yield Sample("one-class", logits(4, 1), (index(1, 4),), small=True)
    yield Sample("no-rows", logits(0, 5), (index(5, 0),))
    yield Sample("no-index", logits(3, 5), (index(5, 3, 0),))

    yield Sample("transposed", logits(12, 40).t(), (index(12, 40),))
    yield Sample("every-other-class", logits(7, 20)[:, ::2], (index(10, 7),))
    yield Sample("every-other-row", logits(14, 33)[::2], (index(33, 7),))
    yield Sample("shifted", logits(2, 9, 33)[:, :-1], (index(33, 2, 8),))
    yield Sample("permuted", logits(3, 5, 2, 4).permute(2, 1, 0, 3), (index(4, 2, 5, 3),))
    yield Sample("expanded-rows", logits(1, 33).expand(7, 33), (index(33, 7),))
    yield Sample("expanded-classes", logits(7, 1).expand(7, 5), (index(5, 7),))
    yield Sample("expanded-index", logits(7, 33), (index(33, 1).expand(7),))
    yield Sample("misaligned", logits(5 * 37 + 1)[1:].view(5, 37), (index(37, 5),))

    yield Sample("wide", logits(3, 5000), (index(5000, 3),))
    yield Sample("wide-softcap", logits(3, 9001), (index(9001, 3),), {"softcap": 8.0, "temperature": 0.5})
    yield Sample("widest", logits(2, 151936), (index(151936, 2, 5),))
    yield Sample("many-rows", logits(3000, 16), (index(16, 3000),))
    yield Sample("offset", logits(4, 5000) + (100 if dtype == torch.float16 else 1e4), (index(5000, 4),))
    late = logits(3, 6000)
    late[0, 5000] = 200
    late[1, :600] = -60000 if dtype == torch.float16 else -1e9
    late[2, :600] = -_INF
    yield Sample("late-maximum", late, (torch.full((3,), 5000, device=device),))
    holes = logits(4, 40)
    holes[:, ::3] = -_INF
    yield Sample("minus-inf", holes, (torch.full((4,), 1, device=device),))
    yield Sample("minus-inf-at-index", holes, (index(40, 4, 20),), {"temperature": 3.0}, finite=False)
    broken = logits(5, 5000)
    broken[0, 4900] = float("nan")
    broken[1, 3] = _INF
    broken[2] = -_INF
    yield Sample("nan-inf", broken, (index(5000, 5),), finite=False)

    for n in (4097, 9000):  # the first or last block holds only NaN or only -inf
        broken = logits(3, n)
        broken[0, 4096] = float("nan")
        broken[1, :4096] = float("nan")
        broken[2, 4096:] = -_INF
        yield Sample(f"nan-block-{n}", broken, (index(4096, 3),), finite=False)

    # Finite logits of any size, from masks with large negative numbers or from small temperatures.
    huge, cold = (2e4, 1e-4) if dtype == torch.float16 else (1e30, 1e-9)
    masked = logits(2, 9000)
    masked[:, :4096] = -huge
    yield Sample("masked-block", masked, (index(4096, 2, 3) + 4096,))
    yield Sample("huge", logits(6, 300, scale=huge), (index(300, 6, 3),))
    yield Sample("huge-transposed", logits(300, 6, scale=huge).t(), (index(300, 6),))
    yield Sample("huge-equal", torch.full_like(logits(6, 300), -huge), (index(300, 6),))
    yield Sample("huge-softcap", logits(6, 300, scale=huge), (index(300, 6),), {"softcap": huge})
    yield Sample("cold", logits(6, 300, scale=60.0), (index(300, 6, 3),), {"temperature": cold})


def _errors():
    error = functools.partial(error_case, tse.selective_log_softmax)
    x, index = torch.zeros(2, 5), torch.tensor([0, 1])
    match = r"index: expected a class index in \[0, 5\), got 5 at row 1"
    yield error("class-too-large", IndexError, match, torch.zeros(3, 5), torch.tensor([0, 5, 1]), cpu_only=True)
    match = r"index: expected a class index in \[0, 5\), got -1 at row 2"
    several = torch.tensor([[0, 1], [2, 3], [4, -1]]).int()
    yield error("class-negative", IndexError, match, torch.zeros(3, 5), several, return_entropy=True, cpu_only=True)
    yield error("scalar", RuntimeError, r"input: .* scalar", torch.zeros(()), index[:1])
    match = r"index: expected the shape of input without its last dimension.* got \[2\]"
    yield error("rows", RuntimeError, match, torch.zeros(3, 5), index)
    yield error("rank", RuntimeError, r"index: expected the shape", torch.zeros(2, 3, 5), index)
    yield error("integer-logits", NotImplementedError, r"input: expected float32.* got Long", x.long(), index)
    yield error("int16-index", RuntimeError, r"index: expected int64 or int32, got Short", x, index.short())
    yield error("temperature", ValueError, r"temperature: expected a positive number, got 0", x, index, temperature=0.0)
    yield error("softcap", ValueError, r"softcap: expected None or a positive number, got -1", x, index, softcap=-1.0)
    yield error("no-number", TypeError, r"temperature: expected float, got str", x, index, temperature="hot")
    yield error("no-tensor", TypeError, r"input: expected Tensor, got list", [1.0], index[:1])
    yield error("no-index", TypeError, r"index: expected Tensor, got None", x, None)
    yield error("device", RuntimeError, r"index: expected device .* got meta", x, index.to("meta"))


SPEC = OpSpec(
    name="selective_log_softmax",
    op=tse.selective_log_softmax,
    module=None,
    reference=_reference,
    torch_op=_torch_op,
    samples=_samples,
    errors=tuple(_errors()),
    bench_shapes=(
        BenchShape((256, 1000)),
        BenchShape((512, 151936), torch.bfloat16, goals=(("forward", "eager", 0.25),), front=("forward+backward",)),
    ),
    bench_cuda_shapes=(BenchShape((8192, 151936), torch.bfloat16, front=("forward+backward",)),),
    bench_args=lambda x: (torch.randint(0, x.shape[-1], x.shape[:-1]),),
    bench_modes={"forward": "read", "forward+backward": "copy"},
    # Rounded to the dtype of the logits.
    bench_eager=lambda options: lambda x, index: x.log_softmax(-1).gather(-1, index.unsqueeze(-1)).squeeze(-1),
    rows=lambda x, index: (x[:1], index[:1]),
    general_options={"softcap": 5.0, "temperature": 0.7},
    variants=("selective_log_softmax_with_entropy",),
)
