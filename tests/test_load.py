"""Loading: a readable error for every failure, one OpenMP runtime, threads, and processes after fork."""

import os
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent


def python(code, **env):
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **env}, cwd=ROOT, capture_output=True, text=True, timeout=120
    )


def test_missing_library():
    run = python("import torch_softmax_ext", TORCH_SOFTMAX_EXT_LIBRARY="/nowhere/_C.so")
    assert "ImportError: torch_softmax_ext: its compiled library could not be loaded: the library" in run.stderr
    assert "build it with" in run.stderr


def build(tmp_path, source, *flags):
    (tmp_path / "x.cpp").write_text(source)
    subprocess.run(
        ["g++", "-shared", "-fPIC", str(tmp_path / "x.cpp"), "-o", str(tmp_path / "x.so"), *flags], check=True
    )
    return str(tmp_path / "x.so")


def test_library_for_another_torch(tmp_path):
    library = build(tmp_path, "extern void from_another_torch(); struct S { S() { from_another_torch(); } } s;")
    run = python("import torch_softmax_ext", TORCH_SOFTMAX_EXT_LIBRARY=library)
    assert f"it was built for another version of PyTorch than {torch.__version__}" in run.stderr
    assert "The above exception was the direct cause" in run.stderr
    assert "from_another_torch" in run.stderr


def test_library_that_needs_a_missing_one(tmp_path):
    (tmp_path / "libneeded.so").write_bytes(
        Path(build(tmp_path, "void needed() {}", "-Wl,-soname,libneeded.so")).read_bytes()
    )
    library = build(tmp_path, "void needed(); struct S { S() { needed(); } } s;", f"-L{tmp_path}", "-lneeded")
    (tmp_path / "libneeded.so").unlink()
    run = python("import torch_softmax_ext", TORCH_SOFTMAX_EXT_LIBRARY=library)
    assert "one that it needs (for a CUDA build: CUDA's runtime), was not found" in run.stderr
    assert "libneeded.so" in run.stderr


def test_cuda_kernels_are_in_the_library_where_they_can_be_built():
    """On a machine with nvcc, such as CI, they are compiled, linked and loaded."""
    code = """
import runpy, torch, torch_softmax_ext
can, why = runpy.run_path("setup.py", run_name="functions")["choose_cuda"]()
print(can == torch.ops.torch_softmax_ext._has_cuda(), why)
"""
    assert python(code).stdout.startswith("True")


def test_without_torch():
    run = python("import sys; sys.modules['torch'] = None\nimport torch_softmax_ext")
    assert "ImportError: torch_softmax_ext needs PyTorch 2.11 or newer" in run.stderr


def test_one_openmp_runtime_and_two_threads():
    code = """
import re, torch, torch_softmax_ext as tse
torch.set_num_threads(2)
tse.cross_entropy(torch.randn(64, 5000), torch.zeros(64, dtype=torch.long))
maps = open("/proc/self/maps").read()
print(len(set(re.findall(r"\\S*libgomp\\S*", maps))), len(__import__("os").listdir("/proc/self/task")))
"""
    runtimes, threads = python(code, OMP_NUM_THREADS="2").stdout.split()
    assert int(runtimes) == 1
    assert int(threads) >= 2


def test_fork():
    """A child of fork, such as a DataLoader's worker, computes with one thread."""
    code = """
import os, torch, torch_softmax_ext as tse
x, t = torch.randn(64, 5000), torch.zeros(64, dtype=torch.long)
want = tse.cross_entropy(x, t)
pid = os.fork()
if pid == 0:
    torch.set_num_threads(1)
    os._exit(0 if torch.equal(tse.cross_entropy(x, t), want) and tse.sparsemax(x).sum() > 63 else 1)
assert os.waitpid(pid, 0)[1] == 0
print("ok")
"""
    assert python(code).stdout == "ok\n"
