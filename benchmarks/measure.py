"""Interleaved medians: the providers of a row are timed in turn, several times over, so that a slow minute of the
machine hits all of them."""

import datetime
import os
import platform
import resource
import statistics
import time
from pathlib import Path

import torch
from torch.utils.benchmark import Timer
from tqdm import tqdm

import torch_softmax_ext as tse
from benchmarks.goals import NO_PEERS
from benchmarks.providers import engine, providers, roofs
from benchmarks.rows import LARGE, call, rows_of, tensors_of
from torch_softmax_ext.testing.memory import peak_memory

# Freed memory stays with the process, so that the next call needs no fresh pages.
WARM_ALLOCATOR = {"GLIBC_TUNABLES": "glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=1099511627776"}


def environment(threads):
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), platform.machine())
    return {
        "date": datetime.date.today().isoformat(),
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": threads,
        "isa": torch.ops.torch_softmax_ext._cpu_isa(),
        "torch": torch.__version__,
        "torch_softmax_ext": tse.__version__,
        "python": platform.python_version(),
        "allocator": "warm" if os.environ.get("GLIBC_TUNABLES") == WARM_ALLOCATOR["GLIBC_TUNABLES"] else "default",
    }


class Clock:
    """A Timer's clock that also counts the page faults between its last two calls, which enclose the timed ones."""

    def __init__(self):
        self.before = self.after = 0

    def __call__(self):
        self.before, self.after = self.after, resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        return time.perf_counter()

    def page_faults(self):
        return self.after - self.before


def interleaved(calls, threads, rounds, seconds=0.02):
    """Median seconds and page faults per call, for each of `calls`, {name: function}. A round is four turns; calls of
    more than 50 ms are timed in the first turn only."""
    timers, numbers, once_of, clock = {}, {}, {}, Clock()
    for name, function in calls.items():
        own = 1 if name.endswith("1 thread") else threads
        timers[name] = Timer("f()", globals={"f": function}, num_threads=own, timer=clock)
        once = timers[name].timeit(1).mean
        if once < 1:
            timers[name].timeit(max(2, min(20, int(0.3 / once))))  # until malloc's thresholds have settled
            once = timers[name].timeit(1).mean
        once_of[name] = once
        numbers[name] = max(1, int(seconds / 4 / max(once, 1e-7)))
    times, faults = {name: [] for name in calls}, {name: [] for name in calls}
    for turn in range(4 * (rounds if max(once_of.values()) < 1 else min(rounds, 3))):
        for name, timer in timers.items():
            if turn % 4 != 0 and once_of[name] > 0.05:
                continue
            times[name].append(timer.timeit(numbers[name]).mean)
            faults[name].append(clock.page_faults() / numbers[name])
    return [{name: statistics.median(v) for name, v in of.items()} for of in (times, faults)]


def file_name(environment):
    """One file per class of machines and allocator: a new run replaces the last one."""
    words = environment["cpu"].lower().replace("(r)", "").split()
    allocator = "" if environment["allocator"] == "default" else f"-{environment['allocator']}"
    return f"cpu-{words[0]}-{environment['isa']}{allocator}"


def calls_of(spec, shape, mode, x, args, skip=()):
    """What is timed in a row, in this order: ours and its variants, peers, torch's shortest backward pass, roofs."""
    functions = providers(spec, shape)
    calls = {"ours": call(functions["ours"], mode, x, args)}
    if mode == "accumulation":
        calls["plain backward"] = call(functions["ours"], "forward+backward", x, args)
    if mode == "forward" and shape.scale != 1:
        calls["σ = 1"] = call(functions["ours"], mode, x / shape.scale, args)
    if x.numel() < LARGE:
        calls["ours 1 thread"] = calls["ours"]
    if mode == "forward" and x.dim() == 2 and len(x) > 1:
        calls["ours in cache"] = call(functions["ours"], mode, x[:1].expand(x.shape), args)
    peers = () if mode == "in place" else functions  # which no peer does
    calls |= {n: call(functions[n], mode, x, args) for n in peers if n not in ("ours", *skip)}
    if mode == "backward":
        calls["relu"] = call(torch.relu, mode, x, ())
    if mode != "forward":
        calls["engine"] = engine(mode)
    return calls | roofs(spec, x, args)


def measure(specs, threads, rounds=7, pattern="", skip=()):
    """A run: one dictionary a row, with seconds and page faults of everything in `calls_of` and the peak bytes of ours
    and the peers. `skip`: peers to leave out."""
    torch.set_num_threads(threads)
    results = []
    bar = tqdm(list(rows_of(specs, pattern)), mininterval=1)
    for name, spec, shape, mode in bar:
        bar.set_description(name)
        torch._dynamo.reset()
        x, args = tensors_of(spec, shape)
        calls = calls_of(spec, shape, mode, x, args, skip)
        seconds, faults = interleaved(calls, threads, rounds)
        large = spec.bench_bytes(x, *args) >= 1 << 18
        memory = {n: peak_memory(f) for n, f in calls.items() if large and n not in NO_PEERS}
        row = {
            "name": name,
            "operator": spec.name,
            "mode": mode,
            "bytes": spec.bench_bytes(x, *args),
            "roof": spec.bench_modes[mode],
        }
        row |= {"shape": list(shape.shape), "dtype": str(shape.dtype)[6:], "scale": shape.scale, "label": shape.label}
        differentiated = (x, *(a for a in args if a.requires_grad))
        row["gradient_bytes"] = sum(t.nbytes for t in differentiated) if "backward" in mode else 0
        row |= {"seconds": seconds, "page_faults": faults, "peak_bytes": memory}
        results.append(row)
    return {"environment": environment(threads), "rows": results}
