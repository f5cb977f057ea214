"""The sweep of the CUDA kernels without a GPU: its shapes, statistics and reports, and that it builds."""

import json
import subprocess
from pathlib import Path

import pytest

from tools import cuda_report, gpu
from torch_softmax_ext.testing import SPECS

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def ask(tmp_path_factory):
    """Runs gpu_sweep_main.cpp; the lines that it prints, or of its error."""
    program = tmp_path_factory.mktemp("gpu_sweep") / "main"
    source = ROOT / "tests" / "gpu_sweep_main.cpp"
    command = ["g++", "-std=c++17", "-O0", "-Wall", "-Werror", f"-I{ROOT / 'tools'}", source, "-o", program]
    subprocess.run(command, check=True)

    def ask(*arguments):
        run = subprocess.run([program, *map(str, arguments)], capture_output=True, text=True)
        return (run.stdout if run.returncode == 0 else run.stderr).splitlines()

    return ask


def test_shapes_that_are_measured(ask):
    rounds, *names = ask("shapes")
    assert rounds == "15"
    assert len(names) == len(set(names)) > 50
    for n in (256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536):
        assert f"cross_entropy 32768x{n} bfloat16 none forward" in names
    for n in (32000, 50256, 50257, 128256, 151936, 262144):
        assert f"cross_entropy 8192x{n} bfloat16 forward+backward" in names
    for mode in ("forward", "backward"):
        for sigma in ("", " x0.1", " x0.01"):
            for shape in ("1048576x64", "16384x4096", "8192x8192", "2048x32000", "512x131072"):
                assert f"sparsemax {shape} bfloat16{sigma} {mode}" in names
        for operator in ("softmax", "entmax15", "entmax"):
            assert f"{operator} 8192x8192 bfloat16 {mode}" in names
    assert "entmax15_loss 8192x32000 bfloat16 forward+backward" in names
    for name in ("float32 none forward", "float32 forward+backward"):
        assert f"cross_entropy 4096x128256 {name}" in names
    for mode in ("forward", "forward+backward"):
        assert f"cross_entropy 8x10 float32 {mode}" in names
        assert f"selective_log_softmax 8192x151936 bfloat16 {mode}" in names


def test_shapes_have_the_names_of_the_benchmark(ask):
    """So that both can be read side by side."""
    from benchmarks import cuda

    names = set(ask("shapes")[1:]) & {row.name for row in cuda.plan(SPECS)}
    assert len(names) > 35


def test_filters(ask):
    everything = ask("shapes")[1:]
    chosen = ask("shapes", "--only", "x128256 bfloat16", "--rounds", "3")
    assert chosen[0] == "3"
    assert chosen[1:] == [name for name in everything if "x128256 bfloat16" in name]
    assert 3 < len(chosen[1:]) < len(everything)
    tiny = ask("shapes", "--tiny")[1:]
    assert len(tiny) == len(set(tiny)) == len([name for name in everything if " x0." not in name])
    sizes = [[int(part) for part in name.split()[1].split("x")] for name in tiny]
    assert all(rows <= 64 and rows * n <= 1 << 22 for rows, n in sizes)
    assert ask("shapes", "--only", "no such shape")[1:] == []


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--no-such"], "unknown argument --no-such"),
        (["--only"], "--only: expected a value"),
        (["--rounds", "0"], "--rounds: expected a positive number"),
    ],
)
def test_arguments_that_are_wrong(ask, arguments, error):
    assert ask("shapes", *arguments) == [error]


def test_statistics(ask):
    assert ask("stats", 3, 1, 2) == ["2 1 3"]
    assert ask("stats", 4, 1, 2, 10) == ["3 1 10"]
    assert ask("stats", 7) == ["7 7 7"]
    assert ask("stats") == ["nan nan nan"]


def test_clocks(ask):
    fields = ask("clocks", "1980, 3201, 120.51, 35, 0x0000000000000004\n")
    assert json.loads(fields[0]) == {
        "clocks.sm": "1980",
        "clocks.mem": "3201",
        "power.draw": "120.51",
        "temperature.gpu": "35",
        "clocks_event_reasons.active": "0x0000000000000004",
    }
    for line in ("", 'Field "clocks.sm" is not valid', "1, 2, 3, 4", "1, 2, 3, 4, 5, 6", "1, , 3, 4, 5"):
        assert ask("clocks", line) == ["{}"]


def test_the_report(ask, tmp_path):
    file = tmp_path / "sweep.json"
    *table, right = ask("report", file)
    assert right == "0 1"  # with a wrong variant, and without
    assert [path.name for path in tmp_path.iterdir()] == ["sweep.json"]
    got = json.loads(file.read_text())
    assert got["environment"] == {"device": "Some Card"}
    assert [block["name"] for block in got["blocks"]] == ['cross_entropy "8x10" \\', "null"]
    first, second = got["blocks"]
    assert first["bytes"] == 320
    assert first["clocks_before"]["clocks.sm"] == "1980"
    assert first["clocks_after"] == {}
    results = {r["variant"]: r for r in first["results"]}
    assert results["library"]["us"] == {"median": 20, "min": 10, "max": 30}
    assert results["library"]["rounds"] == [30, 10, 20]
    assert results["library"]["ratio"] == 2.5  # to the faster roof
    assert results["library"]["errors"] == [
        {"output": "loss", "input": "randn", "norm": 1e-7, "max": 2e-7, "right": True}
    ]
    assert [name for name, r in results.items() if r["roof"]] == ["copy", "memcpy"]
    assert results["ring"]["status"] == "wrong"
    assert results["ring"]["us"]["median"] is results["ring"]["errors"][0]["norm"] is None
    assert second["results"][0]["us"]["median"] == 3
    assert second["results"][0]["ratio"] is None
    rows = [line.split() for line in table if "8x10" not in line]
    assert rows == [["us", "min", "max", "x", "roof"], ["null", "null", "3.00", "2.00", "4.00"]]
    cells = [line.rsplit("  ", 1)[-1].strip() for line in table if "skipped" in line]
    assert cells == ["skipped: not on this card"]


def test_documents_leave_the_sweep_out(tmp_path, monkeypatch):
    from benchmarks import report

    monkeypatch.setattr(report, "RESULTS", tmp_path)
    (tmp_path / gpu.sweep_file("Some Card 100")).write_text('{"environment": {}, "blocks": []}')
    (tmp_path / "cpu-some.json").write_text('{"environment": {"date": "2026-01-01"}, "rows": []}')
    assert gpu.sweep_file("Some Card 100") == "sweep-some-card-100.json"
    assert list(report.runs()) == ["cpu-some"]


@pytest.mark.full
@pytest.mark.skipif(not cuda_report.available(), reason="no CUDA toolkit")
def test_the_program_builds_and_lists_without_a_gpu(ask, tmp_path):
    program = tmp_path / "gpu_sweep"
    build = subprocess.run(gpu.sweep_build("9.0", program), cwd=ROOT, capture_output=True, text=True)
    assert build.returncode == 0, build.stderr
    assert "warning" not in build.stderr
    run = subprocess.run([program, "--list"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    variants = dict(line.rsplit(": ", 1) for line in run.stdout.splitlines())
    assert list(variants) == ask("shapes")[1:]
    assert all("library" in names for names in variants.values())
    # Where a row is larger than one ring, clusters alone write its gradient.
    assert variants["cross_entropy 8192x32000 bfloat16 forward+backward"].startswith("library, ring 256, ring 512")
    assert variants["cross_entropy 8192x262144 bfloat16 forward+backward"] == "library, ring 256 x4, ring 512 x4"
    assert variants["sparsemax 8192x8192 bfloat16 forward"] == "library"
    assert subprocess.run([program, "--no-such"], capture_output=True).returncode == 2
