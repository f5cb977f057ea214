"""Every instruction-set level runs, and gives right values: each in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import CUDA_ON_HOST

LEVELS = ["default", "avx2", "avx512"]
best = LEVELS.index(torch.ops.torch_softmax_ext._cpu_isa()) if "ATEN_CPU_CAPABILITY" not in os.environ else 0

pytestmark = pytest.mark.skipif(
    CUDA_ON_HOST or "ATEN_CPU_CAPABILITY" in os.environ, reason="the level is chosen from outside"
)


def run(level, *command):
    env = {**os.environ, "ATEN_CPU_CAPABILITY": level}
    return subprocess.run(
        [sys.executable, *command], env=env, cwd=Path(__file__).parent.parent, capture_output=True, text=True
    )


def level_of(wish):
    code = "import torch, torch_softmax_ext; print(torch.ops.torch_softmax_ext._cpu_isa())"
    return run(wish, "-c", code).stdout.strip()


@pytest.mark.parametrize("level", LEVELS)
def test_level(level):
    if LEVELS.index(level) > best:
        pytest.skip(f"this machine has {LEVELS[best]} at most")
    assert level_of(level) == level
    out = run(level, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short", "tests/test_all_ops.py", "-k",
              "values or same_bits or gradcheck")  # fmt: skip
    assert out.returncode == 0, out.stdout[-4000:]


def test_a_level_above_the_machine_is_lowered_and_other_words_change_nothing():
    assert level_of("avx512") == LEVELS[best]
    assert level_of("something else") == LEVELS[best]
