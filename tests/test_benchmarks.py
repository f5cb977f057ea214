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


def row(mode="accumulation", **seconds):
    return {
        "name": f"cross_entropy 1x128256 float32 {mode}",
        "roof": "read",
        "seconds": seconds,
        "page_faults": dict.fromkeys(seconds, 100),
    }


def test_a_variant_in_the_row_goes_before_another_row():
    value = goals.variant("plain backward", "accumulation", "forward+backward")
    assert value(row(**{"ours": 10, "plain backward": 8}), {}) == 10 / 8
    other = {"cross_entropy 1x128256 float32 forward+backward": row("forward+backward", ours=20)}
    assert value(row(ours=10), other) == 10 / 20


def test_a_reason_is_what_was_measured_in_the_run():
    environment = {"cpu": "no such machine", "isa": "avx9", "threads": 4}

    def reason(mode, rows=(), **seconds):
        goal = next(g for g in goals.GOALS if g.mode == mode and (rows == ()) != (g.value is goals.one_thread))
        return goals.reason(row(mode, **seconds), dict(rows), goal, environment)

    assert reason("accumulation", ours=10, engine=3) == "100 page faults a call; the least of torch's own with a " \
        "backward pass 3000.0 ms"  # fmt: skip
    assert reason("accumulation", ours=100, engine=3) == "100 page faults a call"
    assert reason("forward", **{"ours": 10, "ours in cache": 9, "read": 5}) == "1.80 × read where every row is the " \
        "first one; 100 page faults a call"  # fmt: skip
    assert reason("forward", **{"ours": 10, "ours in cache": 11, "read": 5}) == "100 page faults a call"
    small = {"cross_entropy 8x10 float32 forward": row("forward", ours=2)}
    assert "with the rest divided 4000.0 ms" in reason("forward", small, **{"ours": 7, "ours 1 thread": 10})
