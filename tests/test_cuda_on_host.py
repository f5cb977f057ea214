"""The CUDA kernels executed on the host: every value test, sanitizers, bank conflicts, and planted bugs that must be
found."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from cuda_on_host import build
from cuda_on_host.plants import ENTMAX_FWD, PLANTS, Plant

pytestmark = pytest.mark.skipif(
    build.cuda_include() is None, reason="no CUDA headers (toolkit or nvidia-cuda-runtime package)"
)
full = pytest.mark.full
orders = pytest.mark.parametrize("order", ["ascending", "descending"])  # a race fails in one of them


@pytest.fixture(scope="module")
def library():
    return build.library()


# Tests of values alone also run in the other order.
RUNS = [
    pytest.param("ascending", "not full and not full_on_host", id="ascending", marks=pytest.mark.long),
    pytest.param("ascending", "full or full_on_host", id="ascending-full", marks=full),
    pytest.param("descending", "values", id="descending", marks=full),
]


@pytest.mark.parametrize(("order", "tests"), RUNS)
def test_all_value_tests_pass_on_the_cuda_kernels(library, order, tests):
    env = {**os.environ, "TORCH_SOFTMAX_EXT_LIBRARY": str(library), "TSE_CUDA_ORDER": order}
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", "tests", "-m", tests]
    run = subprocess.run(command, cwd=build.ROOT, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-6000:]
    passed = int(re.search(r"(\d+) passed", run.stdout)[1])
    assert passed > (10 if "or" in tests else 200), run.stdout[-500:]


def run_program(program, mode, order="ascending"):
    env = {**os.environ, "TSE_CUDA_ORDER": order, "TSAN_OPTIONS": "history_size=0 halt_on_error=1"}
    command = [str(program), *(["small"] if mode in ("tsan", "banks") else [])]
    run = subprocess.run(command, env=env, capture_output=True, text=True)
    return run.returncode, run.stdout + run.stderr


@full
@orders
@pytest.mark.parametrize("mode", ["asan", "tsan"])
def test_sanitizers_find_nothing(mode, order):
    code, output = run_program(build.program(mode), mode, order)
    assert (code, output) == (0, "ok\n"), output[-3000:]


@pytest.mark.parametrize("name", PLANTS)
def test_planted_bug_matches_one_place(name):
    plant = PLANTS[name]
    assert len(re.findall(plant.pattern, (build.CSRC / plant.file).read_text(), flags=re.M)) == 1


def bank_conflicts(plant=None):
    """{source line: ways} of accesses to shared memory that conflict."""
    program = build.program("banks", plant)
    code, output = run_program(program, "banks")
    assert code == 0, output[-3000:]
    assert int(re.search(r"(\d+) places access shared memory", output)[1]) > 30
    found = dict(re.findall(r"(0x[0-9a-f]+) (\d+)-way bank conflict", output))
    command = ["addr2line", "-e", str(program), *found]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines() if found else []
    return {Path(line.split()[0]).name: int(ways) for line, ways in zip(lines, found.values(), strict=True)}


@full
def test_no_bank_conflicts():
    assert bank_conflicts() == {}


@full
def test_a_planted_bank_conflict_is_found():
    """Consecutive vectors are written and read 32 bytes apart, which is right but slow."""
    apart = "(v < kept / 2 * 2 ? v % (kept / 2) * 2 + v / (kept / 2) : v)"
    pattern, replacement = r"(return cache)\[v\]([\s\S]*?cache)\[v\] = e", rf"\1[{apart}]\2[{apart}] = e"
    found = bank_conflicts(Plant(ENTMAX_FWD, pattern, replacement, "banks", "", "sparsemax"))
    assert found
    assert set(found.values()) == {2}
    assert all(line.startswith("entmax_fwd.cuh:") for line in found)


@full
@pytest.mark.parametrize("name", PLANTS)
def test_planted_bug_is_found(name):
    plant = PLANTS[name]
    code, output = run_program(build.program(plant.mode, plant), plant.mode)
    assert code != 0
    assert re.search(plant.words, output), output[-3000:]


def run_on_host(library, code, **settings):
    env = {**os.environ, "TORCH_SOFTMAX_EXT_LIBRARY": str(library), **settings}
    run = subprocess.run([sys.executable, "-c", code], cwd=build.ROOT, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]


def test_rows_beyond_two_to_the_31(library):
    """Only the last row of 5.6 GB of logits is touched, so the other pages are never allocated."""
    code = (
        "import torch, torch_softmax_ext as tse, mmap\n"
        "rows, n = 40000, 69999\n"
        "m = mmap.mmap(-1, rows * n * 2, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000)\n"  # MAP_NORESERVE
        "x = torch.frombuffer(m, dtype=torch.bfloat16).view(rows, n)\n"
        "x[-1, 5] = 8\n"
        "assert x.numel() > 2**31\n"
        "target = torch.full((rows,), 5)\n"
        "got = tse.cross_entropy(x, target, reduction='none')[-1]\n"
        "want = torch.nn.functional.cross_entropy(x[-1].double(), target[-1])\n"
        "torch.testing.assert_close(got, want.float())\n"
        "assert int(tse.sparsemax(x)[-1].argmax()) == 5\n"
    )
    run_on_host(library, code, TSE_CUDA_ONLY_BLOCK="39999", TSE_CUDA_MULTIPROCESSORS="40000")


def test_small_calls_launch_once(library):
    """One kernel in forward, one in backward, whatever the guess, the reduction and the place of the gradient."""
    code = (
        "import ctypes, torch, torch_softmax_ext as tse\n"
        f"launches = ctypes.CDLL({str(library)!r}).cuda_on_host_launches\n"
        "launches.restype = ctypes.c_int64\n"
        "target = torch.randint(0, 50, (300,))\n"
        "for reduction in ('mean', 'sum', 'none'):\n"
        "    for in_place in (False, True):\n"
        "        for factor in (1, 1, 1, 0.5, 0.5, 0.5):\n"
        "            z = torch.randn(300, 50, requires_grad=True) * 1\n"
        "            before = launches()\n"
        "            loss = tse.cross_entropy(z, target, reduction=reduction, inplace_backward=in_place)\n"
        "            assert launches() == before + 1\n"
        "            loss.backward(torch.full_like(loss, factor))\n"
        "            in_backward = 0 if in_place and reduction == 'none' else 1  # torch's own multiplication\n"
        "            assert launches() == before + 1 + in_backward\n"
        "for n in (8, 50, 3000):\n"
        "    z = torch.randn(300, n, requires_grad=True)\n"
        "    before = launches()\n"
        "    p = tse.sparsemax(z)\n"
        "    assert launches() == before + 1\n"
        "    p.backward(torch.ones_like(p))\n"
        "    assert launches() == before + 2\n"
    )
    run_on_host(library, code)


def test_more_sequences_of_launches_than_states(library):
    """A failed launch ends a sequence of launches. A sequence that finds no state left uses one of its own."""
    code = (
        "import torch, torch_softmax_ext as tse\n"
        "z, target = torch.randn(300, 50), torch.randint(0, 50, (300,))\n"
        "want = torch.nn.functional.cross_entropy(z, target)\n"
        "failed = 0\n"
        "for _ in range(600):\n"
        "    try:\n"
        "        tse.cross_entropy(z[:1], torch.tensor([50]))\n"
        "    except RuntimeError:\n"
        "        failed += 1\n"
        "assert failed == 600\n"
        "for _ in range(3):\n"
        "    x = z.clone().requires_grad_()\n"
        "    torch.empty(1 << 20).fill_(1e30)  # the memory that is allocated next is not zero\n"
        "    loss = tse.cross_entropy(x, target)\n"
        "    torch.testing.assert_close(loss, want)\n"
        "    loss.backward()\n"
        "    assert x.grad.isfinite().all()\n"
    )
    run_on_host(library, code)
