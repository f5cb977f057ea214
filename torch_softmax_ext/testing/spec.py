"""The form of an operator's specification."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Sample:
    """One call: ``op(input, *args, **kwargs)``. ``input`` is what is differentiated."""

    name: str
    input: Tensor
    args: tuple = ()
    kwargs: dict = field(default_factory=dict)
    small: bool = False  # affordable for gradcheck, opcheck and compilation
    finite: bool = True  # False: the reference gives infinities or NaN somewhere

    def call(self, function: Callable, input: Tensor | None = None) -> Tensor:
        return function(self.input if input is None else input, *self.args, **self.kwargs)


@dataclass(frozen=True)
class ErrorCase:
    """A call that must raise ``error`` with the text ``{operator}: {match}``."""

    name: str
    call: Callable[[torch.device], object]
    error: type[Exception]
    match: str
    cpu_only: bool = False  # on CUDA a device-side assertion


def error_case(op, name, error, match, *args, cpu_only=False, **options) -> ErrorCase:
    """``op(*args, **options)`` must raise. Its tensors are moved to the device, unless they are meta tensors."""

    def on(device, value):
        return value.to(device) if isinstance(value, Tensor) and value.device.type != "meta" else value

    def call(device):
        return op(*(on(device, a) for a in args), **{k: on(device, v) for k, v in options.items()})

    return ErrorCase(name, call, error, match, cpu_only)


class Random:
    """Random tensors for samples: the same on every device and, up to rounding, in every dtype."""

    def __init__(self, device, dtype, seed=0) -> None:
        self.device, self.dtype = device, dtype
        self._generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape, scale=1.0) -> Tensor:
        x = torch.randn(shape, generator=self._generator, dtype=torch.float64)
        return (x * scale).to(self.dtype).to(self.device)

    def uniform(self, *shape) -> Tensor:
        x = torch.rand(shape, generator=self._generator, dtype=torch.float64)
        return x.to(self.dtype).to(self.device)

    def probabilities(self, *shape, dim=-1) -> Tensor:
        x = torch.randn(shape, generator=self._generator, dtype=torch.float64)
        return x.softmax(dim).to(self.dtype).to(self.device)

    def classes(self, count, *shape, ignored=0) -> Tensor:
        """Class indices below `count`; the first `ignored` are -100."""
        t = torch.randint(0, count, shape, generator=self._generator).to(self.device)
        t.view(-1)[:ignored] = -100
        return t


@dataclass(frozen=True)
class BenchShape:
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    scale: float = 1.0  # standard deviation of the logits
    label: str = ""  # names what the fields below change
    options: dict = field(default_factory=dict)  # keywords of the call
    args: Callable | None = None  # replaces the spec's bench_args
    modes: tuple[str, ...] | None = None  # those of the spec's bench_modes that are measured; None: all
    functions: tuple[Callable, Callable] | None = None  # ours and torch's; replace the spec's
    goals: tuple[tuple[str, str, float], ...] = ()  # (mode, measure, limit): benchmarks/goals.py
    gates: dict[str, float] = field(default_factory=dict)  # replace the spec's bench_gates, mode by mode
    front: tuple[str, ...] = ()  # modes that the README shows


@dataclass(frozen=True)
class Peer:
    """Another library's function for the same job. ``make(options)`` imports it and returns it, or raises where the
    library is not installed, or returns None where it lacks one of the options."""

    name: str
    package: str  # whose version is reported
    make: Callable
    devices: tuple[str, ...] = ("cpu",)


@dataclass(frozen=True, kw_only=True)
class OpSpec:
    name: str  # of the public function and of torch.ops.torch_softmax_ext.<name>
    op: Callable  # the public function
    module: Callable | None  # its nn.Module, without arguments; None: there is none
    variants: tuple[str, ...] = ()  # its operators with several results; tests/test_<name>*.py has their tests

    # What it computes.
    reference: Callable  # the same call in plain torch, differentiable any number of times; tested in float64
    torch_op: Callable  # what a user has today, in the same dtype: the yardstick for half types
    samples: Callable[[torch.device, torch.dtype], Iterator[Sample]]
    errors: tuple[ErrorCase, ...]
    dtypes: tuple[torch.dtype, ...] = FLOATING
    rows: Callable  # (input, *args) -> the same call for its first row alone: batch invariance
    row_options: dict = field(default_factory=dict)  # keywords that give each row a result of its own
    general_options: dict = field(default_factory=dict)  # keywords that need the kernels' most general code
    # (input in float64, *args) -> where the gradient exists, by a margin; None: everywhere
    differentiable: Callable | None = None
    saves_output: bool = False  # True: backward reads the result; False: it reads the input
    batch_invariant: bool = True  # False: matrix products, whose sums depend on shape, alignment and threads
    autocasts: bool = False  # True: computes in the dtype of autocast
    has_kernels: bool = True  # False: has no CUDA kernels of its own

    # What benchmarks measure.
    bench_shapes: tuple[BenchShape, ...]
    bench_cuda_shapes: tuple[BenchShape, ...] = ()
    bench_args: Callable  # (input) -> further arguments
    bench_modes: dict[str, str]  # what is measured, each with the roof (benchmarks/providers.py) of its bytes
    bench_bytes: Callable = lambda x, *args: x.nbytes  # of the logits
    bench_eager: Callable | None = None  # (options) -> what a user has today, in input's dtype; None: torch_op
    # What is measured of torch's ways. Not compile: there is nothing to fuse. Neither: a peer is what a user has today.
    bench_torch: tuple[str, ...] = ("eager", "compile")
    bench_peers: tuple[Peer, ...] = ()
    bench_roofs: Callable | None = None  # (input, *args) -> {name: function}; None: read, copy and add
    bench_gates: dict[str, float] = field(default_factory=dict)  # mode -> most new / old: benchmarks/compare.py

    @property
    def overload(self):
        return getattr(torch.ops.torch_softmax_ext, self.name).default
