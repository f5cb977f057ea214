"""What the compiler made of the CUDA kernels, without a GPU: ``python -m benchmarks.cuda_report``.

For each kernel registers, spills, shared memory, resident threads per multiprocessor, and of its instructions the
16-byte loads and stores, the narrower ones, and ex2. For one architecture: sm_90, unless --arch says another.
"""

import argparse
import collections
import functools
import re
import runpy
import shutil
import subprocess
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parent.parent
COUNTED = {
    "ld128": r"LDG\.E\S*\.128",
    "ld": r"LDG\.E(?!\S*\.128)",
    "st128": r"STG\.E\S*\.128",
    "st": r"STG\.E(?!\S*\.128)",
    "ex2": r"MUFU\.EX2",
}
REGISTERS, THREADS, BLOCKS, SHARED = 65536, 2048, 32, 227 * 1024  # of a multiprocessor of sm_80 and sm_90


def cuobjdump():
    """NVIDIA's tool: on PATH, or of the packages nvidia-cuda-cuobjdump and nvidia-cuda-nvdisasm."""
    found = sorted(Path(sysconfig.get_path("purelib")).glob("nvidia/*/bin/cuobjdump"))
    return shutil.which("cuobjdump") or (str(found[0]) if found else None)


@functools.cache
def cuda_home():
    return runpy.run_path(str(ROOT / "setup.py"), run_name="setup_functions")["find_cuda_home"]()


def available():
    return cuda_home() is not None and cuobjdump() is not None


def short(name):
    """A demangled kernel without namespaces, arguments and casts."""
    name = re.sub(r"\(anonymous namespace\)::|tse::|^void ", "", name)
    name = re.sub(r"\((?:int|bool)\)(\w+)", r"\1", name.replace("(bool)1", "true").replace("(bool)0", "false"))
    depth, end = 0, len(name)
    for i, c in enumerate(name):  # arguments begin at the first parenthesis outside <>
        depth += (c == "<") - (c == ">")
        if c == "(" and depth == 0:
            end = i
            break
    return name[:end]


def kernels_of(source, arch):
    """One dictionary per kernel of a .cu file."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernels.cubin"
        command = [f"{cuda_home()}/bin/nvcc", "-std=c++17", "-O3", f"-arch={arch}", "-cubin", "-Xptxas=-v"]
        command += [f"-I{ROOT / 'csrc'}", str(source), "-o", str(cubin)]
        log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        sass = subprocess.run([cuobjdump(), "-sass", str(cubin)], capture_output=True, text=True, check=True).stdout
    result = {}
    for entry in log.split("Compiling entry function '")[1:]:
        number = {k: int(m[1]) if (m := re.search(p, entry)) else 0 for k, p in {
            "registers": r"Used (\d+) registers", "spills": r"(\d+) bytes spill stores", "shared": r"(\d+) bytes smem",
        }.items()}  # fmt: skip
        result[entry.split("'")[0]] = number
    for function in re.split(r"\n\s*Function : ", sass)[1:]:
        name, body = function.split("\n", 1)
        instructions = re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?\S+\s+)?([A-Z][A-Z0-9_.]*)", body, re.M)
        counts = collections.Counter()
        for instruction in instructions:
            for kind, pattern in COUNTED.items():
                counts[kind] += bool(re.match(pattern, instruction))
        result[name.strip()] |= {**{k: counts[k] for k in COUNTED}, "instructions": len(instructions)}
    names = subprocess.run(["c++filt"], input="\n".join(result), capture_output=True, text=True, check=True).stdout
    return [{"kernel": short(n), **v} for n, v in zip(names.splitlines(), result.values(), strict=True)]


def resident_threads(kernel):
    """Threads of a multiprocessor that registers and shared memory leave room for."""
    parameters = re.search(r"<[^,]*, (\d+)", kernel["kernel"])
    row_threads = int(parameters[1]) if parameters else 1024
    threads = max(row_threads, 128)  # kBlockThreads of vec.cuh
    warps = threads // 32
    registers = -(-kernel["registers"] * 32 // 256) * 256 * warps
    blocks = min(BLOCKS, THREADS // threads, REGISTERS // registers)
    if kernel["shared"]:
        blocks = min(blocks, SHARED // kernel["shared"])
    return blocks * threads


def report(arch="sm_90"):
    with ThreadPoolExecutor(2) as pool:
        files = sorted((ROOT / "csrc").rglob("*.cu"))
        kernels = [k for found in pool.map(lambda f: kernels_of(f, arch), files) for k in found]
    return [{**k, "resident": resident_threads(k)} for k in kernels]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="sm_90")
    arguments = parser.parse_args()
    if not available():
        raise SystemExit("no CUDA toolkit, or no cuobjdump: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm")
    rows = report(arguments.arch)
    columns = [c for c in rows[0] if c != "kernel"]
    print(f"| kernel ({arguments.arch}) | {' | '.join(columns)} |\n|---|{'--:|' * len(columns)}")
    for row in rows:
        print(f"| `{row['kernel']}` | {' | '.join(str(row[c]) for c in columns)} |")


if __name__ == "__main__":
    main()
