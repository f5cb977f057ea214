"""The benchmark on a GPU: times from CUDA events, with a cold L2."""

import datetime
import importlib.metadata
import math
import platform
import re
import statistics
import subprocess
import time

import torch

import torch_softmax_ext as tse
from benchmarks.providers import providers
from benchmarks.rows import call, rows_of
from torch_softmax_ext.testing.memory import peak_memory

SMALL = 1 << 20  # bytes; smaller calls are bound by their launches and timed as a caller sees them
WARM_UP, ROUNDS, REPEATS, SECONDS = 3, 3, 5, 0.13  # REPEATS and SECONDS: at most, of a provider in a round
LATE = "compile"  # takes seconds a row: measured at the end, for as many rows as there is time


def version(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def peers(specs):
    return {peer.name: version(peer.package) for spec in specs for peer in spec.bench_peers if "cuda" in peer.devices}


def environment(specs):
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
        "peers": peers(specs) | {"triton": version("triton")},
    }


# ---- times --------------------------------------------------------------------------------------------------------


class Clock:
    """Times calls on the current device, in seconds."""

    def __init__(self):
        # Read before each call: L2 is cold and has nothing to write back, and the call's launches are queued while the
        # device is busy.
        self.flush = torch.empty(
            max(2 * torch.cuda.get_device_properties(0).L2_cache_size, 1 << 29) // 4, device="cuda"
        )

    def on_device(self, function):
        """Median of single calls, by events."""
        begin, times = time.perf_counter(), []
        while len(times) < 3 or (len(times) < REPEATS and time.perf_counter() - begin < SECONDS):
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self.flush.sum()
            start.record()
            function()
            stop.record()
            stop.synchronize()
            times.append(start.elapsed_time(stop) / 1e3)
        return statistics.median(times)

    def of_caller(self, function, calls=50):
        """Of back-to-back calls, launches included."""
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(calls):
            function()
        torch.cuda.synchronize()
        return (time.perf_counter() - begin) / calls

    def of_rounds(self, runs, bytes_):
        """{name: seconds of each round} of {name: function}, which take turns."""
        for function in runs.values():
            for _ in range(WARM_UP):
                function()
        torch.cuda.synchronize()
        times = {name: [] for name in runs}
        for _ in range(ROUNDS):
            for name, function in runs.items():
                small = bytes_ < SMALL and name not in ROOFS
                times[name].append(self.of_caller(function) if small else self.on_device(function))
        return times


def roofs(x):
    """copy: of the input; add: two such tensors into a third."""
    a = x.reshape(-1).view(torch.int16 if x.element_size() == 2 else torch.int32)
    b = torch.empty_like(a)
    return {"copy": lambda: b.copy_(a), "add": lambda: torch.add(a, b, out=b)}


ROOFS = ("copy", "add")
CLOCKS = "clocks.sm,clocks.mem,power.draw,temperature.gpu,clocks_event_reasons.active"


def clocks():
    """What nvidia-smi says of the card just now; empty where it does not."""
    query = ["nvidia-smi", f"--query-gpu={CLOCKS}", "--format=csv,noheader,nounits", "--id=0"]
    try:
        run = subprocess.run(query, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    values = [value.strip() for value in run.stdout.split(",")]
    return dict(zip(CLOCKS.split(","), values, strict=True)) if values.count("") == 0 and len(values) == 5 else {}


class Row:
    """One row of the plan. Its tensors are made anew, with the same values, each time it is measured."""

    def __init__(self, name, spec, shape, mode):
        self.name, self.spec, self.shape, self.mode = name, spec, shape, mode
        self.bytes = math.prod(shape.shape) * shape.dtype.itemsize
        self.seconds, self.rounds, self.peak, self.errors, self.clocks = {}, {}, {}, {}, {}

    def functions(self, late):
        return {n: f for n, f in providers(self.spec, self.shape, "cuda").items() if (n == LATE) == late}

    def measure(self, clock, late=False):
        if self.bytes * 5 > torch.cuda.get_device_properties(0).total_memory:
            self.errors["all"] = "needs more memory than the card has"
            return
        torch.manual_seed(0)
        torch._dynamo.reset()
        x = torch.randn(self.shape.shape, device="cuda", dtype=self.shape.dtype) * self.shape.scale
        args = tuple(a.cuda() for a in (self.shape.args or self.spec.bench_args)(x))
        runs = {} if late else roofs(x)
        for name, function in self.functions(late).items():
            try:
                logits = x if name in ("ours", "eager", LATE) else x.clone()  # some peers overwrite their input
                run = call(function, self.mode, logits, args)
                run()
                self.peak[name] = peak_memory(run, "cuda")
                runs[name] = run
            except Exception as error:  # a peer failed: the others are still measured
                self.errors[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"
            torch.cuda.empty_cache()
        self.rounds |= clock.of_rounds(runs, self.bytes)
        self.clocks = clocks()
        self.seconds |= {name: statistics.median(self.rounds[name]) for name in runs}
        self.seconds["read"] = self.seconds["copy"] / 2

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
            "rounds": self.rounds,
            "clocks": self.clocks,
            "peak_bytes": self.peak,
            "errors": self.errors,
        }


def plan(specs, pattern=""):
    return [Row(*row) for row in rows_of(specs, pattern, cuda=True)]


def measure(specs, seconds, pattern="", skip=()):
    """A run as measure.measure returns it. All rows without torch.compile, then compilations while there is time."""
    end = time.monotonic() + seconds
    clock, rows = Clock(), plan(specs, pattern)
    late = [] if LATE in skip else rows
    for number, (row, is_late) in enumerate([*((r, False) for r in rows), *((r, True) for r in late)]):
        if time.monotonic() > end:
            break
        print(f"[{number + 1}] {row.name}{' compile' if is_late else ''}", flush=True)
        row.measure(clock, is_late)
    return {"environment": environment(specs), "rows": [r.result() for r in rows if "ours" in r.seconds]}


def require_device():
    if not torch.cuda.is_available():
        raise SystemExit(f"benchmarks: no CUDA device: torch {torch.__version__} sees none")
    if not torch.ops.torch_softmax_ext._has_cuda():
        raise SystemExit("benchmarks: torch_softmax_ext was built without CUDA kernels: make gpu, or FORCE_CUDA=1")


def file_name(environment):
    return "cuda-" + re.sub(r"[^a-z0-9]+", "-", environment["device"].lower()).strip("-")
