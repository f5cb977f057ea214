"""The CUDA kernels executed on the host: every value test of the CPU, the sanitizers, and bugs that must be found."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from cuda_on_host import build

pytestmark = pytest.mark.skipif(
    build.cuda_include() is None, reason="no CUDA headers (toolkit or nvidia-cuda-runtime package)"
)
full = pytest.mark.full
orders = pytest.mark.parametrize("order", ["ascending", "descending"])  # a race between barriers goes wrong in one


@pytest.fixture(scope="module")
def library():
    return build.library()


# What sees nothing but the kernels runs in the other order, too.
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


REDUCE = "common/cuda/reduce.cuh"
SPARSEMAX_FWD, SPARSEMAX_BWD = "sparsemax/sparsemax_fwd.cu", "sparsemax/sparsemax_bwd.cu"
STATE = "common/cuda/stream_state.cuh"
PLANTS = {
    # name: (file, pattern, replacement), who must find it, with what words
    "no-barrier-after-write": (
        (REDUCE, r"^    __syncthreads\(\);\n(    v = partial)", r"\1"),
        ("tsan", "data race"),
    ),
    "no-barrier-before-reuse": (
        (REDUCE, r"^    __syncthreads\(\);  // the next.*$", ""),
        ("tsan", "data race"),
    ),
    "barrier-in-one-warp": (
        (REDUCE, r"^(    v = partial.*)$", r"if (threadIdx.x < 32) __syncthreads();\n\1"),
        ("plain", "divergent barrier"),
    ),
    "read-past-the-row": (
        ("common/cuda/vec.cuh", r"if \(tail \+ lane < n\) scalar", "if (tail + lane <= n) scalar"),
        ("asan", "heap-buffer-overflow"),
    ),
    "unaligned-load": (
        ("common/cuda/vec.cuh", r"const int64_t head = unaligned_head\(x, n\),", "const int64_t head = 0,"),
        ("plain", "misaligned 16-byte load"),
    ),
    "no-fence-before-the-ticket": (
        (STATE, r"^    __threadfence\(\);\n(    is_last)", r"\1"),
        ("tsan", "data race"),
    ),
    "no-fence-behind-the-ticket": (
        (STATE, r"^(    is_last.*)\n    __threadfence\(\);", r"\1"),
        ("tsan", "data race"),
    ),
    "ticket-not-reset": (
        (STATE, r"atomicInc\(ticket, gridDim.x - 1\)", "atomicInc(ticket, ~0u)"),
        ("plain", "ticket|reduced"),
    ),
    "gradient-before-all-have-read-the-target": (
        ("cross_entropy/cross_entropy_fwd.cu", r"^.*__syncwarp\(\);.*$", ""),
        ("tsan", "data race"),
    ),
    "one-vector-too-many-is-kept": (
        ("common/cuda/kept_row.cuh", r"if \(v < kept_vectors_\) kept_", "if (v <= kept_vectors_) kept_"),
        ("asan", "heap-buffer-overflow"),
    ),
    "what-was-not-kept-is-taken-from-shared-memory": (
        (
            "common/cuda/kept_row.cuh",
            r"return v < kept_vectors_ \? kept_",
            "return v < kept_vectors_ + (kept_vectors_ > 0) ? kept_",
        ),
        ("plain", "known gradient"),
    ),
    "any-guess-is-right": (
        ("cross_entropy/cross_entropy_bwd.cu", r"== \*p.guess\) return", "== *p.guess || *p.guess == *p.guess) return"),
        ("plain", "gradient after a wrong guess"),
    ),
    "no-guess-is-right": (
        ("cross_entropy/cross_entropy_bwd.cu", r"== \*p.guess\) return", "!= *p.guess) {}"),
        ("plain", "a pass after a right guess"),
    ),
    "a-guess-from-one-backward": (
        ("cross_entropy/cross_entropy_bwd.cu", r"state->last\[which\] == grad;", "1;"),
        ("plain", "guess"),
    ),
    "the-divisor-counts-ignored-rows": (
        (
            "cross_entropy/cross_entropy_fwd.cu",
            r"!is_counted\(p, target\) \|\| p.rows.n == 0\) continue",
            "false) continue",
        ),
        ("plain", "known gradient"),
    ),
    "a-column-in-one-sum": (
        ("common/cuda/compensated.cuh", r"^    rest \+= v - \(s - sum\);$", ""),
        ("plain", "gradient|loss"),
    ),
    "shared-memory-too-small": (
        (SPARSEMAX_FWD, r"kept \* sizeof\(Vec<T>\),", "(kept - 1) * sizeof(Vec<T>),"),
        ("asan", "heap-buffer-overflow"),
    ),
    "no-shared-memory-for-the-supports": (
        (SPARSEMAX_BWD, r"kept \* kKeptBytes<T>,", "kept * sizeof(Vec<T>),"),
        ("asan", "heap-buffer-overflow"),
    ),
    "a-bound-that-kills-the-living": (
        (SPARSEMAX_FWD, r"add_down\(max, A\(-1\)\)", "add_down(max, A(-0.5))"),
        ("plain", r"probability\["),
    ),
    "elements-before-the-vectors-forgotten": (
        (SPARSEMAX_FWD, r"^      add\(loose\);$", ""),
        ("plain", r"probability\["),
    ),
    "nan-kept-from-the-dead": (
        (SPARSEMAX_FWD, r"tau\.t != tau\.t \? tau\.t : A\(0\)", "A(0)"),
        ("plain", r"probability\["),
    ),
    "dead-vectors-of-a-living-group-not-kept": (
        (SPARSEMAX_FWD, r"v < kept && \(above \|\| live\.shift != 0\)", "v < kept && above"),
        ("plain", r"probability\["),
    ),
    "rows-of-a-warp-part": (
        (SPARSEMAX_FWD, r"if \(!any_goes_on\) return;", "if (!goes_on) return;"),
        ("plain", "deadlock|waits for a lane|stand at"),
    ),
    "no-barrier-after-the-step": (
        (SPARSEMAX_FWD, r"(search\[0\]\.step\(s\);\n)      __syncthreads\(\);", r"\1"),
        ("tsan", "data race"),
    ),
    "gradient-of-a-vector-behind-those-kept": (
        (
            SPARSEMAX_BWD,
            r"gradient\(v < kept \? kept_g\[v\] : .*?, support",
            "gradient(kept_g[v < kept ? v : 0], support",
        ),
        ("plain", "sparsemax gradient"),
    ),
    "past-the-loose-elements": (
        ("sparsemax/row_parts.cuh", r"return i < n \? i : -1;", "return i <= n ? i : -1;"),
        ("asan", "heap-buffer-overflow"),
    ),
    "no-barrier-before-the-asked-classes": (
        ("selective_log_softmax/selective_log_softmax_bwd.cu", r"^    row_barrier<kRowThreads>\(\);$", ""),
        ("tsan", "data race"),
    ),
    "lanes-missing-from-a-shuffle": (
        (REDUCE, r"^  v = warp_reduce\(v, op\);$", "  if (threadIdx.x % 32 < 20) v = warp_reduce(v, op);"),
        ("plain", "deadlock|waits for a lane|stand at"),
    ),
}


@pytest.mark.parametrize("name", PLANTS)
def test_planted_bug_has_its_place(name):
    (file, pattern, _), _ = PLANTS[name]
    assert len(re.findall(pattern, (build.CSRC / file).read_text(), flags=re.M)) == 1


def bank_conflicts(plant=None):
    """{line of the source: ways} of what needs more than one turn for its bytes."""
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
    """Neighbouring vectors 32 bytes apart, written and read alike: right, and slow."""
    apart = "(v < kept / 2 * 2 ? v % (kept / 2) * 2 + v / (kept / 2) : v)"
    pattern, replacement = r"cache\[v\]( = batch[\s\S]*?\? cache)\[v\]", rf"cache[{apart}]\1[{apart}]"
    found = bank_conflicts((SPARSEMAX_FWD, pattern, replacement))
    assert found
    assert set(found.values()) == {2}
    assert all(line.startswith("sparsemax_fwd.cu:") for line in found)


@full
@pytest.mark.parametrize("name", PLANTS)
def test_planted_bug_is_found(name):
    plant, (mode, words) = PLANTS[name]
    code, output = run_program(build.program(mode, plant), mode)
    assert code != 0
    assert re.search(words, output), output[-3000:]


def run_on_host(library, code, **settings):
    env = {**os.environ, "TORCH_SOFTMAX_EXT_LIBRARY": str(library), **settings}
    run = subprocess.run([sys.executable, "-c", code], cwd=build.ROOT, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]


def test_rows_behind_two_to_the_31(library):
    """Only the last row of 5.6 GB of logits is touched: the pages of the others never exist."""
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
    """Forward one kernel, backward one; guessed or not, reduced or not, in place or not."""
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


def test_more_orders_of_launches_than_states(library):
    """A launch that failed ends an order of launches; calls of orders that find no state left have one of their own."""
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
        "    torch.empty(1 << 20).fill_(1e30)  # what is allocated next is not zero, but for the first time\n"
        "    loss = tse.cross_entropy(x, target)\n"
        "    torch.testing.assert_close(loss, want)\n"
        "    loss.backward()\n"
        "    assert x.grad.isfinite().all()\n"
    )
    run_on_host(library, code)
