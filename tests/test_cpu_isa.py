"""Every instruction-set level runs, and gives right values: each in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

LEVELS = ["default", "avx2", "avx512"]
best = LEVELS.index(torch.ops.torch_softmax_ext._cpu_isa()) if "ATEN_CPU_CAPABILITY" not in os.environ else 0

pytestmark = pytest.mark.skipif("ATEN_CPU_CAPABILITY" in os.environ, reason="the level is chosen from outside")


def run(level, *command):
    env = {**os.environ, "ATEN_CPU_CAPABILITY": level}
    return subprocess.run(
        [sys.executable, *command], env=env, cwd=Path(__file__).parent.parent, capture_output=True, text=True
    )


def level_of(wish):
    code = "import torch, torch_softmax_ext; print(torch.ops.torch_softmax_ext._cpu_isa())"
    return run(wish, "-c", code).stdout.strip()


@pytest.mark.full
@pytest.mark.parametrize("level", LEVELS)
def test_values(level):
    if LEVELS.index(level) > best:
        pytest.skip(f"this machine has {LEVELS[best]} at most")
    out = run(level, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short", "tests", "-m", "values")
    assert out.returncode == 0, out.stdout[-4000:]


def test_the_level_is_as_wished_where_the_machine_has_it():
    for level in LEVELS[: best + 1]:
        assert level_of(level) == level
    assert level_of("avx512") == LEVELS[best]
    assert level_of("something else") == LEVELS[best]


AT_THE_END_OF_A_PAGE = """
import ctypes, mmap, sys
import torch, torch_softmax_ext as tse
from torch_softmax_ext.testing import SPECS

memory = mmap.mmap(-1, 2 * mmap.PAGESIZE)
behind = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + mmap.PAGESIZE
assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(behind), ctypes.c_size_t(mmap.PAGESIZE), 0) == 0

def at_the_end(x):
    begin = mmap.PAGESIZE - x.nbytes
    return torch.frombuffer(memory, dtype=x.dtype, count=x.numel(), offset=begin).view(x.shape).copy_(x)

for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
    for n in (*range(1, 71), *range(127, 146)):
        for spec in SPECS:
            if spec.name == "linear_cross_entropy":
                continue  # torch's matrix product has other bits where x lies otherwise
            x = torch.randn(2, n).to(dtype)
            args = spec.bench_args(x)
            want = spec.op(x, *args)
            assert torch.equal(spec.op(at_the_end(x), *args), want), (spec.name, dtype, n)
        target = torch.zeros(2, dtype=torch.long)
        want = tse.cross_entropy(x, target, label_smoothing=0.1)
        columns = at_the_end(x.t().contiguous()).t()
        assert torch.equal(tse.cross_entropy(columns, target, label_smoothing=0.1), want), (dtype, n)
        leaf = x.clone().requires_grad_()
        tse.cross_entropy(leaf, target).backward()
        written = at_the_end(x)
        logits = written.mul_(torch.ones((), dtype=dtype, requires_grad=True))  # computed, in that memory
        tse.cross_entropy(logits, target, inplace_backward=True).backward()
        want = x if dtype == torch.float16 else leaf.grad  # whose gradient is made in backward
        assert torch.equal(written.detach(), want), (dtype, n)
print("all of them")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="asks for mprotect")
@pytest.mark.parametrize("level", LEVELS)
def test_nothing_behind_the_logits_is_touched(level):
    """They end where memory does that may be read or written; in place the gradient is written there, too."""
    if LEVELS.index(level) > best:
        pytest.skip(f"this machine has {LEVELS[best]} at most")
    out = run(level, "-c", AT_THE_END_OF_A_PAGE)
    assert out.stdout == "all of them\n", f"exit status {out.returncode}: {out.stderr[-2000:]}"
