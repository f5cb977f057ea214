"""`make gpu` and the CUDA benchmark without a GPU: the plan, the report, and how they fail."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import cuda, report
from benchmarks.providers import providers
from tools import gpu
from torch_softmax_ext.testing import SPECS, Peer

ROOT = Path(__file__).parent.parent


def run(*arguments):
    command = [sys.executable, "-m", *arguments]
    return subprocess.run(command, cwd=ROOT, env=dict(os.environ), capture_output=True, text=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("module", [("tools.gpu",), ("benchmarks", "--device", "cuda")], ids=str)
def test_without_a_gpu_one_line_says_so(module):
    got = run(*module)
    assert got.returncode != 0
    assert "no CUDA device" in got.stderr
    assert "Traceback" not in got.stderr


def test_the_steps_fit_in_their_time():
    for seconds in (480, 240):
        assert sum(step.seconds for step in gpu.steps("9.0", seconds)) <= seconds
    names = [step.name for step in gpu.steps("9.0", 480)]
    sweep = ["sweep build", "sweep", "sweep memcheck", "sweep racecheck"]
    assert names == ["build", "tests", "memcheck", "racecheck", *sweep, "benchmark"]
    assert gpu.benchmark_step(200).command[-1] == "160"
    listed = run("tools.gpu", "--list").stdout
    assert "compute-sanitizer" in listed
    assert "-arch=sm_90" in listed
    assert "sweep-no-card.json" in listed


def test_a_step_that_fails_does_not_stop_the_next(monkeypatch, capsys):
    python = [sys.executable, "-c"]
    steps = [
        gpu.Step("fails", [*python, "raise SystemExit(3)"], 20),
        gpu.Step("hangs", [*python, "import time; time.sleep(60)"], 0.5),
        gpu.Step("absent", ["x"], 20, needs="no-such-program"),
        gpu.Step("lacks", ["x"], 20, modules=("no_such_module",)),
        gpu.Step("works", [*python, "pass"], 20),
    ]
    monkeypatch.setattr(gpu, "device", lambda: ("card", "9.0"))
    monkeypatch.setattr(gpu, "steps", lambda *_: steps)
    assert gpu.main([]) == 1
    outcomes = [line.split("|")[1:3] for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][1:]
    outcomes = [(name.strip(), outcome.strip()) for name, outcome in outcomes]
    assert outcomes == [
        ("fails", "failed"),
        ("hangs", "failed"),
        ("absent", "skipped"),
        ("lacks", "failed"),
        ("works", "ok"),
    ]
    assert gpu.main(["--only", "works", "absent"]) == 0


def test_the_plan_has_the_shapes_that_peers_publish():
    rows = {row.name: row for row in cuda.plan(SPECS)}
    for n in (256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536):
        assert f"cross_entropy 32768x{n} bfloat16 none forward" in rows
    for n in (32000, 50256, 50257, 128256, 151936, 262144):
        assert f"cross_entropy 8192x{n} bfloat16 forward+backward" in rows
    for mode in ("forward", "backward"):
        lengths = {row.shape.shape[1] for row in rows.values() if row.spec.name == "sparsemax" and row.mode == mode}
        assert {64, 131072} <= lengths
    assert len({row.bytes for row in rows.values()}) > 10
    assert len(cuda.plan(SPECS, "sparsemax")) < len(rows)


def test_the_report_of_a_run(tmp_path):
    """Of made-up numbers."""
    environment = {"device": "Some Card 100", "torch": "2.14", "cuda": "13.0", "date": "2026-01-01"}
    rows = cuda.plan(SPECS, "sparsemax") + cuda.plan(SPECS, "cross_entropy 8192")
    for row in rows:
        row.seconds = {"ours": 1.2e-3, "eager": 5e-3, "read": 5e-4, "copy": 1e-3, "add": 1.5e-3}
        row.peak = {"ours": row.bytes, "eager": 3 * row.bytes}
    rows[0].errors = {"some-peer": "OutOfMemoryError: no room"}
    made_up = {"environment": environment, "rows": [row.result() for row in rows]}
    stem = tmp_path / cuda.file_name(environment)
    report.write(made_up, stem)
    assert stem.name == "cuda-some-card-100"
    assert json.loads(stem.with_suffix(".json").read_text()) == made_up
    assert stem.with_suffix(".png").stat().st_size > 10000
    table = report.markdown(made_up)
    assert "Some Card 100" in table
    assert "| sparsemax | 512×131072 bf16 | forward | 1.20 ms | 1.20 | 4.2 | 1.00 : 3.00 |" in table
    assert table.endswith(f"- {rows[0].name}: some-peer: OutOfMemoryError: no room\n")


def test_peers_take_no_options_but_a_reduction():
    (spec,) = (s for s in SPECS if s.name == "cross_entropy")
    assert set(cuda.peers(SPECS)) == {"liger", "quack", "flash-attn"}
    for peer in spec.bench_peers:
        assert peer.make({"label_smoothing": 0.1}) is None
    assert cuda.version("no-such-package") == "not installed"


def test_providers_are_those_of_the_device():
    (spec,) = (s for s in SPECS if s.name == "cross_entropy")
    peer = Peer("peer", "package", lambda options: lambda x, target: x, ("cuda",))
    absent = Peer("absent", "package", lambda options: __import__("no_such_module"), ("cuda",))
    spec = dataclasses.replace(spec, bench_peers=(peer, absent))
    assert list(providers(spec, spec.bench_shapes[0])) == ["ours", "eager", "compile"]
    assert list(providers(spec, spec.bench_shapes[0], "cuda")) == ["ours", "eager", "compile", "peer"]


def test_providers_take_turns(monkeypatch):
    calls = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(cuda.Clock, "of_caller", lambda self, function: function() or len(calls))
    clock = object.__new__(cuda.Clock)
    times = clock.of_rounds({name: lambda name=name: calls.append(name) for name in ("ours", "eager")}, bytes_=320)
    assert calls[-6:] == ["ours", "eager"] * 3
    assert times == {"ours": [7, 9, 11], "eager": [8, 10, 12]}


def test_clocks_without_a_card(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert cuda.clocks() == {}
