"""``make gpu``: builds for the card that is there, tests, checks under compute-sanitizer, and measures, in 8 minutes.

Uses the interpreter that runs it, with the torch that it has, and nvcc; installs nothing and needs no network. A step
that fails or takes too long does not keep the later ones from running; the exit status says whether one did.
"""

import argparse
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parent.parent
PYTHON = sys.executable
# What compute-sanitizer watches, which makes kernels many times slower: each of them, in two dtypes.
WATCHED = "every_kernel and (float32 or bfloat16) and not 70001"
SANITIZED = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_cuda.py", "-k", WATCHED]
TESTED = "gpu and not full"
FAILED, SKIPPED, OK = "failed", "skipped", "ok"


@dataclass
class Step:
    name: str
    command: list
    seconds: float  # after which it is stopped
    environment: dict = field(default_factory=dict)
    needs: str = ""  # a program that must be on PATH
    modules: tuple = ()  # that the interpreter must have

    def run(self):
        """(outcome, what to say of it)."""
        if self.needs and shutil.which(self.needs) is None:
            return SKIPPED, f"{self.needs} is not on PATH"
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


def steps(capability, seconds):
    """`seconds` for all of them; the card's compute capability as TORCH_CUDA_ARCH_LIST has it."""
    share = seconds / 480
    parallel = ["-n", str(min(8, os.cpu_count()))] if importlib.util.find_spec("xdist") else []
    build = {"TORCH_CUDA_ARCH_LIST": capability, "FORCE_CUDA": "1", "MAX_JOBS": str(os.cpu_count())}
    in_place = {"PYTHONPATH": str(ROOT), "KINETO_LOG_LEVEL": "99"}
    # Without torch's cache every tensor is an allocation of its own, and an access behind its end is seen.
    sanitized = {**in_place, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    pytest = [PYTHON, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
    tests = ["-m", TESTED, "tests", "--ignore=tests/test_properties.py"]  # which asks for hypothesis, and for the CPU
    setup = [PYTHON, "setup.py", "build_ext", "--inplace", "--force"]  # what was built may lack the CUDA kernels
    sanitizer = ["compute-sanitizer", "--error-exitcode", "1", "--tool"]
    return [
        Step("build", setup, 130 * share, build, "", ("setuptools", "ninja")),
        Step("tests", [*pytest, *parallel, *tests], 120 * share, in_place, "", ("pytest",)),
        Step(
            "memcheck", [*sanitizer, "memcheck", PYTHON, *SANITIZED], 55 * share, sanitized, sanitizer[0], ("pytest",)
        ),
        Step(
            "racecheck", [*sanitizer, "racecheck", PYTHON, *SANITIZED], 55 * share, sanitized, sanitizer[0], ("pytest",)
        ),
        benchmark_step(115 * share),
    ]


def benchmark_step(seconds):
    """What it has no time for, it leaves out; some seconds go by until it measures, and after the last row."""
    command = [PYTHON, "-m", "benchmarks", "--device", "cuda", "--seconds", str(int(seconds * 0.8))]
    return Step("benchmark", command, seconds, {"PYTHONPATH": str(ROOT), "KINETO_LOG_LEVEL": "99"})


def device():
    """(name, compute capability); ends with one clear line where there is none."""
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
    parser.add_argument("--seconds", type=float, default=480, help="for everything together")
    parser.add_argument("--only", nargs="*", help="names of steps")
    parser.add_argument("--list", action="store_true", help="print the steps and run none; needs no GPU")
    options = parser.parse_args(arguments)
    name, capability = ("no card", "9.0") if options.list else device()
    chosen = [s for s in steps(capability, options.seconds) if not options.only or s.name in options.only]
    if options.list:
        for step in chosen:
            print(f"{step.name} (at most {step.seconds:.0f} s): {' '.join(map(str, step.command))}")
        return 0
    print(f"{name}, compute capability {capability}", flush=True)
    outcomes = []
    end = time.monotonic() + options.seconds
    for step in chosen:
        if step.name == "benchmark":  # which has the time that the others left
            step = benchmark_step(max(step.seconds, end - time.monotonic()))
        print(f"\n== {step.name} ==", flush=True)
        begin = time.monotonic()
        outcomes.append((step.name, *step.run(), time.monotonic() - begin))
    print("\n" + summary(outcomes))
    return int(any(outcome == FAILED for _, outcome, _, _ in outcomes))


if __name__ == "__main__":
    sys.exit(main())
