import json
import mmap

import pytest
from torch.utils.benchmark import Timer

from benchmarks import goals, measure, report

RUNS = [p for p in measure.RESULTS.glob("*.json") if not p.stem.startswith("cuda")]


@pytest.mark.parametrize("path", RUNS, ids=lambda p: p.stem)
def test_the_tables_are_those_of_the_measurements(path):
    run = json.loads(path.read_text())
    assert path.with_suffix(".md").read_text() == report.markdown(run) + "\n" + goals.table(run)


def test_clock_sees_the_page_faults_of_the_timed_calls():
    def fresh():
        with mmap.mmap(-1, 1 << 22) as m:
            m[:: mmap.PAGESIZE] = bytes((1 << 22) // mmap.PAGESIZE)

    clock = measure.Clock()
    Timer("f()", globals={"f": fresh}, timer=clock).timeit(4)
    assert clock.page_faults() >= 4  # where the system has huge pages, two a call
    Timer("f()", globals={"f": lambda: None}, timer=clock).timeit(4)
    assert clock.page_faults() < 4


def row(mode, **seconds):
    name = f"cross_entropy 1x128256 float32 {mode}"
    faults = dict.fromkeys(seconds, 100)
    return {"name": name, "shape": [1, 128256], "roof": "read", "seconds": seconds, "page_faults": faults}


def test_a_variant_in_the_row_goes_before_another_row():
    value = goals.variant("plain backward", "accumulation", "forward+backward")
    assert value(row("accumulation", **{"ours": 10, "plain backward": 8}), {}) == 10 / 8
    other = {"cross_entropy 1x128256 float32 forward+backward": row("forward+backward", ours=20)}
    assert value(row("accumulation", ours=10), other) == 10 / 20


@pytest.mark.parametrize(
    ("value", "seconds", "text"),
    [
        (goals.roof, {"ours": 10, "ours in cache": 9, "read": 5}, "1.80 × read where every row is the first one; F"),
        (goals.roof, {"ours": 10, "ours in cache": 11, "read": 5}, "F"),
        (goals.roof, {"ours": 10, "relu": 15, "read": 5}, "F; relu's backward, of the same bytes, 3.00 × read"),
        (goals.faster, {"ours": 10, "engine": 3}, "F; the least of torch's own with a backward pass 3000.0 ms"),
        (goals.faster, {"ours": 100, "engine": 3}, "F"),
        (
            goals.one_thread,
            {"ours": 7, "ours 1 thread": 10},
            "7000.0 ms, one thread 10000.0 ms; the call itself 2000.0 ms (8×10): with the rest divided 4000.0 ms; F",
        ),
    ],
)
def test_a_reason_is_what_was_measured_in_the_run(value, seconds, text):
    goal = next(g for g in goals.GOALS if g.value is value)
    small = {"cross_entropy 8x10 float32 forward": row("forward", ours=2)}
    environment = {"cpu": "no such machine", "isa": "avx9", "threads": 4}
    want = text.replace("F", "100 page faults a call")
    assert goals.reason(row("forward", **seconds), small, goal, environment) == want


def test_what_is_known_of_a_shape_goes_before_what_is_known_of_the_machine(monkeypatch):
    goal = next(g for g in goals.GOALS if g.value is goals.roof and g.reason)
    environment = {"cpu": "AMD", "isa": "avx9", "threads": 4}
    for known in ({"AMD avx9": "machine", "AMD avx9 1x128256": "shape"}, {"AMD avx9": "machine"}):
        monkeypatch.setitem(goals.REASONS, goal.reason, known)
        assert goals.reason(row("forward", ours=1), {}, goal, environment).endswith("; " + list(known.values())[-1])
