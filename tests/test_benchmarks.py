"""What benchmarks measure, and that the documents' tables are those of the measurements."""

import dataclasses
import mmap
from pathlib import Path

import pytest
import torch
from torch.utils.benchmark import Timer

from benchmarks import compare, goals, measure, providers, report, rows
from torch_softmax_ext.testing import SPECS

ROOT = Path(__file__).parent.parent


def test_the_documents_have_the_tables_of_the_measurements():
    """`python -m benchmarks docs` writes them."""
    for path, text in report.documents(SPECS).items():
        assert path.read_text() == text, path


def test_clock_sees_the_page_faults_of_the_timed_calls():
    def fresh():
        with mmap.mmap(-1, 1 << 22) as m:
            m[:: mmap.PAGESIZE] = bytes((1 << 22) // mmap.PAGESIZE)

    clock = measure.Clock()
    Timer("f()", globals={"f": fresh}, timer=clock).timeit(4)
    assert clock.page_faults() >= 4  # where the system has huge pages, two a call
    Timer("f()", globals={"f": lambda: None}, timer=clock).timeit(4)
    assert clock.page_faults() < 4


def row(name="cross_entropy 256x1000 float32 forward+backward", **seconds):
    faults = dict.fromkeys(seconds, 100)
    return {"name": name, "shape": [1], "roof": "read", "seconds": seconds, "page_faults": faults}


@pytest.mark.parametrize(
    ("seconds", "parts"),
    [
        ({"ours": 10, "ours in cache": 9, "read": 5}, ["1.80 × read where every row is the first one"]),
        ({"ours": 10, "ours in cache": 11, "read": 5}, []),
        ({"ours": 10, "relu": 15, "read": 5}, ["relu's backward, of the same bytes, 3.00 × read"]),
        ({"ours": 10, "engine": 3}, ["torch's shortest backward pass 3.00 s"]),
        ({"ours": 100, "engine": 3}, []),
        ({"ours": 7, "ours 1 thread": 10}, ["7.00 s, one thread 10.0 s"]),
    ],
)
def test_what_a_run_measured_beside_a_goal(seconds, parts):
    assert sorted(goals.beside(row(**seconds))) == sorted([*parts, "100 page faults a call"])


@pytest.mark.parametrize(("best", "mark"), [(31, "✓"), (29, "✗")])
def test_a_goal_is_compared_with_the_best_peer(best, mark):
    table = goals.table({"rows": [row(ours=10, eager=99, compile=best, engine=0)]}, SPECS).splitlines()
    assert len(table) == 3
    assert f"| ≥ 3.0 × faster | {best / 10:.1f} × faster | {mark}" in table[2]


def test_every_goal_can_be_measured():
    for _, spec, shape, mode in rows.rows_of(SPECS):
        for goal_mode, name, _ in shape.goals:
            assert name in goals.MEASURES
            assert goal_mode in spec.bench_modes, (spec.name, mode)


@pytest.mark.parametrize(
    ("seconds", "text"), [(9.6e-6, "9.60 µs"), (371.8e-6, "372 µs"), (1.31e-3, "1.31 ms"), (4.4434, "4.44 s")]
)
def test_durations_have_three_digits(seconds, text):
    assert goals.duration(seconds) == text


def test_compare_names_the_rows_that_are_over_their_gates(monkeypatch, capsys):
    monkeypatch.setattr(compare, "GATES", {"forward": 0.01})
    monkeypatch.setattr(compare, "OTHERWISE", 100)
    over = compare.compare(SPECS, ROOT, threads=1, rounds=2, pattern="selective_log_softmax 256x1000")
    assert over == ["selective_log_softmax 256x1000 float32 forward"]
    lines = capsys.readouterr().out.splitlines()
    assert "| 0.01 | over |" in lines[2]
    assert "| 100.00 |  |" in lines[3]


def test_gates_of_shapes_go_before_those_of_specs():
    found = {name: compare.gate(spec, shape, mode) for name, spec, shape, mode in rows.rows_of(SPECS)}
    assert found["cross_entropy 8x10 float32 forward"] == 1.03
    assert found["cross_entropy 256x1000 float32 forward"] == 1.10
    assert found["cross_entropy 256x1000 float32 forward+backward"] == 1.05
    assert found["cross_entropy 8x21x256x256 float32 forward"] == 1.20
    assert found["sparsemax 1024x512 float32 forward"] == 1.05


def test_compare_makes_rows_that_the_other_tree_lacks():
    (described,) = (compare.describe(*r) for r in rows.rows_of(SPECS) if r[0] == "sparsemax 1x128256 float32 forward")
    older = {s.name: dataclasses.replace(s, bench_shapes=s.bench_shapes[:1]) for s in SPECS}
    assert compare.prepare(older, described)().shape == (1, 128256)
    with pytest.raises(KeyError, match="no such row"):
        compare.prepare(older, {**described, "plain": False})


def test_tensors_of_a_row_are_the_same_every_time():
    (spec,) = (s for s in SPECS if s.name == "cross_entropy")
    first, second = (rows.tensors_of(spec, spec.bench_shapes[0]) for _ in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_eager_takes_the_options_of_every_row():
    for _, spec, shape, _ in rows.rows_of(SPECS):
        small = dataclasses.replace(shape, shape=tuple(min(size, 8) for size in shape.shape))
        x, args = rows.tensors_of(spec, small)
        functions = providers.providers(spec, small)
        for provider in {"ours", "eager"} & functions.keys():
            functions[provider](x, *args)
