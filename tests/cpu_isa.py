"""Running code at each instruction-set level, in a process of its own, and memory that ends where logits end."""

import ctypes
import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import torch_softmax_ext  # noqa: F401  (registers the operators)

LEVELS = ["default", "avx2", "avx512"]
IS_CHOSEN_OUTSIDE = "ATEN_CPU_CAPABILITY" in os.environ
BEST = LEVELS.index(torch.ops.torch_softmax_ext._cpu_isa()) if not IS_CHOSEN_OUTSIDE else 0
levels = pytest.mark.parametrize("level", LEVELS)


def run(level, *command):
    env = {**os.environ, "ATEN_CPU_CAPABILITY": level}
    return subprocess.run(
        [sys.executable, *command], env=env, cwd=Path(__file__).parent.parent, capture_output=True, text=True
    )


def skip_if_missing(level):
    if IS_CHOSEN_OUTSIDE:
        pytest.skip("the level is chosen from outside")
    if LEVELS.index(level) > BEST:
        pytest.skip(f"this machine has {LEVELS[BEST]} at most")


class EndOfPage:
    """Copies tensors to the end of a page; reading or writing the next page ends the process."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, 2 * mmap.PAGESIZE)
        next_page = ctypes.addressof(ctypes.c_char.from_buffer(self._memory)) + mmap.PAGESIZE
        assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(next_page), ctypes.c_size_t(mmap.PAGESIZE), 0) == 0

    def copy(self, x):
        begin = mmap.PAGESIZE - x.nbytes
        return torch.frombuffer(self._memory, dtype=x.dtype, count=x.numel(), offset=begin).view(x.shape).copy_(x)


def check_at_the_end_of_a_page(level, code):
    """`code` checks, for given `dtype` and `n`, what it does with rows of n elements from `end_of_page.copy`."""
    skip_if_missing(level)
    lines = "\n".join("        " + line for line in code.strip().splitlines())
    out = run(level, "-c", SCRIPT + lines + '\nprint("all of them")\n')
    assert out.stdout == "all of them\n", f"exit status {out.returncode}: {out.stderr[-2000:]}"


SCRIPT = """
import sys
sys.path.insert(0, "tests")
import torch, torch_softmax_ext as tse
from cpu_isa import EndOfPage
from torch_softmax_ext.testing import SPECS

end_of_page = EndOfPage()
for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
    for n in (*range(1, 71), *range(127, 146)):
        x = torch.randn(2, n).to(dtype)
"""
