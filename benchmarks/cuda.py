"""The benchmark on a GPU: shapes, peers, and times from CUDA events with a cold L2. Rows and providers are those of
measure.py and providers.py; here is what a GPU does otherwise."""

import contextlib
import dataclasses
import datetime
import importlib
import importlib.metadata
import math
import platform
import re
import statistics
import time

import torch

import torch_softmax_ext as tse
from benchmarks.measure import rows_of
from benchmarks.providers import call, providers
from torch_softmax_ext.testing.memory import peak_memory
from torch_softmax_ext.testing.spec import BenchShape

BF16, FP32 = torch.bfloat16, torch.float32
VOCABULARIES = (32000, 50256, 50257, 128256, 151936, 262144)
# Quack's published ones, 4.3 GB the largest.
QUACK = (
    *((32768, n) for n in (256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536)),
    (16384, 131072),
    (8192, 262144),
)
NONE = {"reduction": "none"}
BOTH = ("forward", "forward+backward")
SPARSE = ((1048576, 64), (131072, 512), (16384, 4096), (8192, 8192), (2048, 32000), (512, 131072))
SHAPES = {
    "cross_entropy": (
        *(BenchShape((8192, n), BF16, modes=("forward+backward",)) for n in VOCABULARIES),
        *(BenchShape(shape, BF16, label="none", options=NONE, modes=("forward",)) for shape in QUACK),
        *(BenchShape((8192, n), BF16, label="none", options=NONE, modes=BOTH) for n in (32000, 128256)),
        BenchShape((8192, 128256), BF16, modes=("accumulation",)),
        BenchShape((4096, 128256), FP32, modes=BOTH),
        BenchShape((8, 10), FP32, modes=BOTH),
        BenchShape((256, 1000), FP32, modes=BOTH),
    ),
    "sparsemax": (
        *(BenchShape(shape, BF16) for shape in SPARSE),
        *(BenchShape(shape, FP32) for shape in SPARSE[2:]),
        *(BenchShape(shape, BF16, scale=0.01) for shape in SPARSE[2:]),  # hundreds are in the support
    ),
    "selective_log_softmax": (BenchShape((8192, 151936), BF16, modes=BOTH),),
}
SMALL = 1 << 20  # bytes; below, a call costs what its launches cost, and is timed as a caller sees it
WARM_UP, REPEATS, SECONDS_PER_PROVIDER = 3, 15, 0.4
LATE = "compile"  # a compilation of seconds for each row: what time is left for, at the end


def gpu_specs(specs):
    return [dataclasses.replace(s, bench_shapes=SHAPES[s.name]) for s in specs if s.name in SHAPES]


# ---- peers: in the environment or not -----------------------------------------------------------------------------


def _liger(reduction):
    function = importlib.import_module("liger_kernel.transformers.functional").liger_cross_entropy

    def run(x, target):  # overwrites the logits: the same work, again and again
        result = function(x, target, reduction=reduction)
        return result[0] if isinstance(result, tuple) else result

    return run


def _quack(reduction):
    function = importlib.import_module("quack.cross_entropy").cross_entropy
    return lambda x, target: function(x, target, reduction=reduction)


def _flash(reduction):
    function = importlib.import_module("flash_attn.ops.triton.cross_entropy").cross_entropy_loss
    return lambda x, target: function(x, target)[0] if reduction == "none" else function(x, target)[0].mean()


PEERS = {"liger": ("liger_kernel", _liger), "quack": ("quack-kernels", _quack), "flash-attn": ("flash_attn", _flash)}


def peers(spec, options):
    """Of cross_entropy with nothing but a reduction. What is not installed is left out."""
    found = {}
    if spec.name == "cross_entropy" and not options.keys() - {"reduction"}:
        for name, (_, make) in PEERS.items():
            with contextlib.suppress(Exception):  # a peer may fail to import for reasons of its own
                found[name] = make(options.get("reduction", "mean"))
    return found


def version(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def environment():
    p = torch.cuda.get_device_properties(0)
    return {
        "date": datetime.date.today().isoformat(),
        "device": p.name,
        "capability": f"{p.major}.{p.minor}",
        "multiprocessors": p.multi_processor_count,
        "memory_bytes": p.total_memory,
        "l2_bytes": p.L2_cache_size,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "torch_softmax_ext": tse.__version__,
        "python": platform.python_version(),
        "peers": {name: version(package) for name, (package, _) in PEERS.items()} | {"triton": version("triton")},
    }


# ---- times --------------------------------------------------------------------------------------------------------


class Clock:
    """Seconds of calls on the current device."""

    def __init__(self):
        # Written before each call: nothing is found in L2, and the calls of a step are under way before it is over.
        self.flush = torch.empty(
            max(2 * torch.cuda.get_device_properties(0).L2_cache_size, 1 << 29) // 4, device="cuda"
        )

    def on_device(self, function):
        """Median of single calls by events, on a device that has work to do when they are launched."""
        for _ in range(WARM_UP):
            function()
        torch.cuda.synchronize()
        begin, times = time.perf_counter(), []
        while len(times) < 3 or (len(times) < REPEATS and time.perf_counter() - begin < SECONDS_PER_PROVIDER):
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self.flush.zero_()
            start.record()
            function()
            stop.record()
            stop.synchronize()
            times.append(start.elapsed_time(stop) / 1e3)
        return statistics.median(times)

    def of_caller(self, function, calls=50):
        """Median over rounds of back-to-back calls, the launches included: what a small call costs its caller."""
        for _ in range(WARM_UP):
            function()
        rounds = []
        for _ in range(7):
            torch.cuda.synchronize()
            begin = time.perf_counter()
            for _ in range(calls):
                function()
            torch.cuda.synchronize()
            rounds.append((time.perf_counter() - begin) / calls)
        return statistics.median(rounds)

    def __call__(self, function, bytes_):
        return self.of_caller(function) if bytes_ < SMALL else self.on_device(function)


def roofs(clock, x):
    """Copying the input, half of that for reading it, and adding two such tensors into a third."""
    a = x.reshape(-1).view(torch.int16 if x.element_size() == 2 else torch.int32)
    b = torch.empty_like(a)
    copy = clock.on_device(lambda: b.copy_(a))
    return {"read": copy / 2, "copy": copy, "add": clock.on_device(lambda: torch.add(a, b, out=b))}


class Row:
    """One row of the plan: its tensors are made anew for each visit, the same every time."""

    def __init__(self, name, spec, shape, mode):
        self.name, self.spec, self.shape, self.mode = name, spec, shape, mode
        self.bytes = math.prod(shape.shape) * shape.dtype.itemsize
        self.seconds, self.peak, self.errors = {}, {}, {}

    def functions(self, late):
        own = providers(self.spec, self.shape.options, self.shape.functions)
        if late:
            return {LATE: own[LATE]} if LATE in own else {}
        ours = {name: own[name] for name in ("ours", "eager")}
        return ours if self.mode == "in place" else ours | peers(self.spec, self.shape.options)

    def measure(self, clock, late=False):
        if self.bytes * 5 > torch.cuda.get_device_properties(0).total_memory:
            self.errors["all"] = "needs more memory than the card has"
            return
        torch.manual_seed(0)
        torch._dynamo.reset()
        x = torch.randn(self.shape.shape, device="cuda", dtype=self.shape.dtype) * self.shape.scale
        args = tuple(a.cuda() for a in (self.shape.args or self.spec.bench_args)(x))
        if not late:
            self.seconds |= roofs(clock, x)
        for name, function in self.functions(late).items():
            try:
                run = call(function, self.mode, x.clone() if name == "liger" else x, args)
                self.seconds[name] = clock(run, self.bytes)
                self.peak[name] = peak_memory(run, "cuda")
            except Exception as error:  # a peer that cannot: the others are still measured
                self.errors[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"
            torch.cuda.empty_cache()

    def result(self):
        s = self.shape
        return {
            "name": self.name,
            "operator": self.spec.name,
            "mode": self.mode,
            "bytes": self.bytes,
            "roof": self.spec.bench_modes[self.mode],
            "shape": list(s.shape),
            "dtype": str(s.dtype)[6:],
            "scale": s.scale,
            "label": s.label,
            "gradient_bytes": self.bytes if "backward" in self.mode else 0,
            "seconds": self.seconds,
            "peak_bytes": self.peak,
            "errors": self.errors,
        }


def plan(specs, pattern=""):
    return [Row(*row) for row in rows_of(gpu_specs(specs), pattern)]


def measure(specs, seconds, pattern="", skip=()):
    """As measure.measure. All rows without torch.compile, then as many compilations as the time allows."""
    end = time.monotonic() + seconds
    clock, rows = Clock(), plan(specs, pattern)
    late = [] if LATE in skip else rows
    for number, (row, is_late) in enumerate([*((r, False) for r in rows), *((r, True) for r in late)]):
        if time.monotonic() > end:
            break
        print(f"[{number + 1}] {row.name}{' compile' if is_late else ''}", flush=True)
        row.measure(clock, is_late)
    return {"environment": environment(), "rows": [r.result() for r in rows if "ours" in r.seconds]}


def require_device():
    if not torch.cuda.is_available():
        raise SystemExit(f"benchmarks: no CUDA device: torch {torch.__version__} sees none")
    if not torch.ops.torch_softmax_ext._has_cuda():
        raise SystemExit("benchmarks: torch_softmax_ext was built without CUDA kernels: make gpu, or FORCE_CUDA=1")


def file_name(environment):
    return "cuda-" + re.sub(r"[^a-z0-9]+", "-", environment["device"].lower()).strip("-")
