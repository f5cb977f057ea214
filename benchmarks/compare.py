"""Two builds of the library, interleaved in one run: ``python -m benchmarks compare --base <another checkout, built>``.

Each tree has a worker: a process that imports its package and makes the calls. Round by round the workers take turns,
one sleeping while the other is timed. The fastest block of calls counts in a round, the median over the rounds. Rows
over their gate are named at the end and make the exit status 1.
"""

import dataclasses
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from benchmarks.goals import duration
from benchmarks.rows import call, name_of, rows_of, tensors_of

ROOT = Path(__file__).parent.parent
GATES = {"forward": 1.10}  # new / old at most; specs and shapes override it
OTHERWISE = 1.05  # other modes
BLOCK, ROUND = 2e-3, 5e-2  # seconds of one timing, and of all timings of a round


def gate(spec, shape, mode):
    return (GATES | spec.bench_gates | shape.gates).get(mode, OTHERWISE)


# ---- the worker -----------------------------------------------------------------------------------------------------


def time_round(function):
    """Seconds of a call in the fastest block."""
    begin = time.perf_counter()
    function()
    once = max(time.perf_counter() - begin, 1e-7)
    calls, best, end = max(1, round(BLOCK / once)), float("inf"), time.perf_counter() + ROUND
    while time.perf_counter() < end:
        begin = time.perf_counter()
        for _ in range(calls):
            function()
        best = min(best, (time.perf_counter() - begin) / calls)
    return best


def prepare(specs, row):
    """The call of a row. A shape that this tree's specs lack is built from the description."""
    spec = specs[row["operator"]]
    shapes = {name_of(spec, s, row["mode"]): s for s in spec.bench_shapes}
    shape = shapes.get(row["name"])
    if shape is None:
        if not row["plain"]:
            raise KeyError(f"no such row here: {row['name']}")
        shape = type(spec.bench_shapes[0])(tuple(row["shape"]), getattr(torch, row["dtype"]), row["scale"])
        shape = dataclasses.replace(shape, options=row["options"])
    x, args = tensors_of(spec, shape)
    ours = shape.functions[0] if shape.functions else spec.op
    return call(lambda *a, **k: ours(*a, **shape.options, **k), row["mode"], x, args)


def worker(tree, threads):
    """Answers each line of standard input with a time: a line describes a row; an empty one repeats the last."""
    sys.path.insert(0, tree)
    import torch_softmax_ext
    from torch_softmax_ext.testing import SPECS

    assert Path(torch_softmax_ext.__file__).is_relative_to(tree), torch_softmax_ext.__file__
    torch.set_num_threads(threads)
    specs, function = {s.name: s for s in SPECS}, None
    for line in sys.stdin:
        try:
            if line.strip():
                function = prepare(specs, json.loads(line))
            answer = {"seconds": time_round(function)}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), flush=True)


class Worker:
    def __init__(self, tree, threads):
        code = f"from benchmarks import compare; compare.worker({str(tree)!r}, {threads})"
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, **pipes)

    def ask(self, line=""):
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise SystemExit("compare: a worker ended: see its message above")
        return json.loads(answer)

    def close(self):
        self.process.stdin.close()
        self.process.wait()


# ---- the driver -----------------------------------------------------------------------------------------------------


def describe(name, spec, shape, mode):
    """A row for JSON. Plain: built from the description alone, so that a tree without it can make it, too."""
    row = {"name": name, "operator": spec.name, "mode": mode, "shape": shape.shape, "dtype": str(shape.dtype)[6:]}
    row |= {"scale": shape.scale, "options": shape.options}
    return row | {"plain": shape.args is None and shape.functions is None}


def measure(old, new, row, rounds):
    """(seconds of the old tree, of the new one), or the error of one of them."""
    line = json.dumps(row)
    for worker in (old, new):
        if "error" in (answer := worker.ask(line)):
            return answer["error"]
    times = {old: [], new: []}
    for number in range(rounds):
        for worker in (old, new) if number % 2 else (new, old):
            answer = worker.ask()
            if "error" in answer:
                return answer["error"]
            times[worker].append(answer["seconds"])
    return statistics.median(times[old]), statistics.median(times[new])


def compare(specs, base, threads, rounds, pattern):
    """Prints a table row by row; returns the names of the rows that are over their gate."""
    base = Path(base).resolve()
    if not (base / "torch_softmax_ext").is_dir():
        raise SystemExit(f"compare: no torch_softmax_ext in {base}")
    old, new = Worker(base, threads), Worker(ROOT, threads)
    print("| row | old | new | new / old | gate | |\n|---|--:|--:|--:|--:|---|", flush=True)
    slower = []
    for name, spec, shape, mode in rows_of(specs, pattern):
        result = measure(old, new, describe(name, spec, shape, mode), rounds)
        if isinstance(result, str):
            print(f"| {name} | – | – | – | – | left out: {result.splitlines()[0]} |", flush=True)
            continue
        limit, ratio = gate(spec, shape, mode), result[1] / result[0]
        slower += [name] if ratio > limit else []
        cells = [name, *map(duration, result), f"{ratio:.3f}", f"{limit:.2f}", "over" if ratio > limit else ""]
        print(f"| {' | '.join(cells)} |", flush=True)
    for worker in (old, new):
        worker.close()
    print("\nOver their gates: " + ("; ".join(slower) if slower else "none"))
    return slower
