"""``make gpu``: builds for the present card, tests, runs compute-sanitizer, and measures, in 8 minutes.

Uses nvcc and the interpreter that runs it, with its torch; installs nothing and needs no network. After a step that
fails or takes too long the next ones still run; the exit status says whether one failed.
"""

import argparse
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parent.parent
PYTHON = sys.executable
# compute-sanitizer makes kernels many times slower: it sees each of them, in two dtypes.
WATCHED = "not float64 and (bfloat16 or not float16) and not 70001"
FILES = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("tests/test_*cuda.py"))
SANITIZED = ["-m", "pytest", "-q", "-p", "no:cacheprovider", *FILES, "-m", "sanitized", "-k", WATCHED]
TESTED = "gpu and not full"
SWEEP = ROOT / "build" / "gpu_sweep"
NVCC = shutil.which("nvcc") or f"{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/bin/nvcc"
FAILED, SKIPPED, OK = "failed", "skipped", "ok"


@dataclass
class Step:
    name: str
    command: list
    seconds: float  # then it is stopped
    environment: dict = field(default_factory=dict)
    needs: str = ""  # a program, by its path or on PATH; skipped without it
    modules: tuple = ()  # of the interpreter; fails without them

    def run(self):
        """(outcome, remark)."""
        if self.needs and shutil.which(self.needs) is None:
            return SKIPPED, f"{self.needs} is not there"
        missing = [m for m in self.modules if importlib.util.find_spec(m) is None]
        if missing:
            return FAILED, f"python has no {', '.join(missing)}"
        process = subprocess.Popen(
            self.command, cwd=ROOT, env={**os.environ, **self.environment}, start_new_session=True
        )
        try:
            code = process.wait(self.seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return FAILED, f"stopped after {self.seconds:.0f} s"
        return (OK, "") if code == 0 else (FAILED, f"exit status {code}")


def sweep_file(card):
    """Of benchmarks/results/."""
    return f"sweep-{re.sub(r'[^a-z0-9]+', '-', card.lower()).strip('-')}.json"


def sweep_build(capability, program=SWEEP):
    """The command that compiles and links tools/gpu_sweep.cu with the library's kernels."""
    sources = ["tools/gpu_sweep.cu", *sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/*/*.cu"))]
    flags = ["-std=c++17", "-O3", f"-arch=sm_{capability.replace('.', '')}", "--threads=0", "-Icsrc"]
    return [NVCC, *flags, "-include", "tools/gpu_sweep_dtypes.cuh", *sources, "-o", str(program)]


def steps(capability, seconds, card="no card"):
    """All steps, which share `seconds`; `capability` as in TORCH_CUDA_ARCH_LIST."""
    share = seconds / 480
    parallel = ["-n", str(min(8, os.cpu_count()))] if importlib.util.find_spec("xdist") else []
    build = {"TORCH_CUDA_ARCH_LIST": capability, "FORCE_CUDA": "1", "MAX_JOBS": str(os.cpu_count())}
    in_place = {"PYTHONPATH": str(ROOT), "KINETO_LOG_LEVEL": "99"}
    # Without torch's cache every tensor is its own allocation, so that an access past its end is found.
    sanitized = {**in_place, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    pytest = [PYTHON, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
    tests = ["-m", TESTED, "tests", "--ignore=tests/test_properties.py"]  # needs hypothesis, and tests the CPU
    setup = [PYTHON, "setup.py", "build_ext", "--inplace", "--force"]  # an earlier build may lack the CUDA kernels
    sanitizer = ["compute-sanitizer", "--error-exitcode", "1", "--tool"]
    return [
        Step("build", setup, 100 * share, build, "", ("setuptools", "ninja")),
        Step("tests", [*pytest, *parallel, *tests], 100 * share, in_place, "", ("pytest",)),
        Step(
            "memcheck", [*sanitizer, "memcheck", PYTHON, *SANITIZED], 50 * share, sanitized, sanitizer[0], ("pytest",)
        ),
        Step(
            "racecheck", [*sanitizer, "racecheck", PYTHON, *SANITIZED], 50 * share, sanitized, sanitizer[0], ("pytest",)
        ),
        Step("sweep build", sweep_build(capability), 40 * share, {}, NVCC),
        Step("sweep", [SWEEP, "--json", f"benchmarks/results/{sweep_file(card)}"], 60 * share, {}, str(SWEEP)),
        Step("sweep memcheck", [*sanitizer, "memcheck", SWEEP, "--tiny"], 20 * share, {}, sanitizer[0]),
        Step("sweep racecheck", [*sanitizer, "racecheck", SWEEP, "--tiny"], 20 * share, {}, sanitizer[0]),
        benchmark_step(40 * share),
    ]


def benchmark_step(seconds):
    """Rows without time are left out; a fifth is for the start and for the row that is running at the end."""
    command = [PYTHON, "-m", "benchmarks", "--device", "cuda", "--seconds", str(int(seconds * 0.8))]
    return Step("benchmark", command, seconds, {"PYTHONPATH": str(ROOT), "KINETO_LOG_LEVEL": "99"})


def device():
    """(name, compute capability); exits with one clear line where there is none."""
    try:
        import torch
    except ImportError as error:
        raise SystemExit(f"make gpu: {PYTHON} has no torch: {error}") from error
    if not torch.cuda.is_available():
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
        raise SystemExit(f"make gpu: no CUDA device: torch {torch.__version__}, {built}, sees none")
    major, minor = torch.cuda.get_device_capability()
    return torch.cuda.get_device_name(), f"{major}.{minor}"


def summary(outcomes):
    lines = ["| step | outcome | seconds | |", "|---|---|--:|---|"]
    return "\n".join([*lines, *(f"| {n} | {o} | {s:.0f} | {t} |" for n, o, t, s in outcomes)])


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=480, help="for all steps together")
    parser.add_argument("--only", nargs="*", help="names of steps")
    parser.add_argument("--list", action="store_true", help="print the steps and run none; needs no GPU")
    options = parser.parse_args(arguments)
    name, capability = ("no card", "9.0") if options.list else device()
    chosen = [s for s in steps(capability, options.seconds, name) if not options.only or s.name in options.only]
    if options.list:
        for step in chosen:
            print(f"{step.name} (at most {step.seconds:.0f} s): {' '.join(map(str, step.command))}")
        return 0
    print(f"{name}, compute capability {capability}", flush=True)
    SWEEP.parent.mkdir(exist_ok=True)
    if any(step.name == "sweep build" for step in chosen):
        SWEEP.unlink(missing_ok=True)  # where the build fails, an older program must not be taken for this one
    outcomes = []
    end = time.monotonic() + options.seconds
    for step in chosen:
        if step.name == "benchmark":  # takes the time that the others left
            step = benchmark_step(max(step.seconds, end - time.monotonic()))
        print(f"\n== {step.name} ==", flush=True)
        begin = time.monotonic()
        outcomes.append((step.name, *step.run(), time.monotonic() - begin))
    print("\n" + summary(outcomes))
    return int(any(outcome == FAILED for _, outcome, _, _ in outcomes))


if __name__ == "__main__":
    sys.exit(main())
