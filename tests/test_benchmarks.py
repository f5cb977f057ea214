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
    assert clock.spent()[0] >= 4  # where the system has huge pages, two a call
    Timer("f()", globals={"f": lambda: None}, timer=clock).timeit(4)
    assert clock.spent()[0] < 4


def row(**seconds):
    name = "cross_entropy 1024x32000 float32 accumulation"
    row = {"name": name, "roof": "copy", "seconds": seconds, "seconds_outside_kernel": dict(seconds)}
    row["seconds_outside_kernel"]["ours"] -= 2
    return row | {"page_faults": dict.fromkeys(seconds, 100)}


def test_the_system_is_taken_off_the_providers_alone():
    left = goals.without_system(row(**{"ours": 10, "eager": 20, "plain backward": 9, "engine": 3, "copy": 4}))
    assert left["seconds"] == {"ours": 5, "eager": 17, "plain backward": 6, "engine": 3, "copy": 4}


def test_a_variant_in_the_row_goes_before_another_row():
    value = goals.variant("plain backward", "accumulation", "forward+backward")
    assert value(row(**{"ours": 10, "plain backward": 8}), {}) == 10 / 8
    other = {"cross_entropy 1024x32000 float32 forward+backward": row(ours=20)}
    assert value(row(ours=10), other) == 10 / 20


def test_a_reason_is_what_was_measured_in_the_run():
    goal = next(g for g in goals.GOALS if g.mode == "accumulation")
    text = goals.reason(row(**{"ours": 10, "engine": 3, "copy": 4}), {}, goal, "no such machine")
    assert text == "100 page faults a call, 2000.0 ms in the kernel; torch's autograd engine 3000.0 ms"
