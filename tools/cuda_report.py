"""What the compiler made of the CUDA kernels, without a GPU: ``python -m tools.cuda_report``.

For each kernel: registers, spills, shared memory, threads per block; the number of 16-byte loads and stores, narrower
ones, and ex2; for its main loop the instructions, those per 16-byte access, their share of what an H100 can issue while
its memory moves those bytes, and the busiest pipe (an estimate: cuda_sass.py); and how many threads a multiprocessor of
several cards holds, by NVIDIA's cuda_occupancy.h. For one architecture, sm_90 by default.
"""

import argparse
import functools
import re
import runpy
import shutil
import subprocess
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tools import cuda_sass

ROOT = Path(__file__).parent.parent
COUNTED = {
    "ld128": r"LDG\.E\S*\.128",
    "ld": r"LDG\.E(?!\S*\.128)",
    "st128": r"STG\.E\S*\.128",
    "st": r"STG\.E(?!\S*\.128)",
    "ex2": r"MUFU\.EX2",
}


def cuobjdump():
    """NVIDIA's tool: on PATH, or from the packages nvidia-cuda-cuobjdump and nvidia-cuda-nvdisasm."""
    found = sorted(Path(sysconfig.get_path("purelib")).glob("nvidia/*/bin/cuobjdump"))
    return shutil.which("cuobjdump") or (str(found[0]) if found else None)


@functools.cache
def cuda_home():
    return runpy.run_path(str(ROOT / "setup.py"), run_name="setup_functions")["find_cuda_home"]()


def available():
    return cuda_home() is not None and cuobjdump() is not None


def short(name):
    """A demangled name without namespaces, arguments and casts."""
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
        sass, elf = (
            subprocess.run([cuobjdump(), f"-{what}", str(cubin)], capture_output=True, text=True, check=True).stdout
            for what in ("sass", "elf")
        )
    result = {}
    for entry in log.split("Compiling entry function '")[1:]:
        number = {k: int(m[1]) if (m := re.search(p, entry)) else 0 for k, p in {
            "registers": r"Used (\d+) registers", "spills": r"(\d+) bytes spill stores", "shared": r"(\d+) bytes smem",
        }.items()}  # fmt: skip
        result[entry.split("'")[0]] = number
    for info in re.split(r"^\.nv\.info\.", elf, flags=re.M)[1:]:  # from __launch_bounds__
        threads = re.search(r"EIATTR_MAX_THREADS\s+Format:.*\s+Value:\s*0x([0-9a-f]+)", info)
        result[info.split()[0]]["threads"] = int(threads[1], 16) if threads else 1024
    for function in re.split(r"\n\s*Function : ", sass)[1:]:
        name, body = function.split("\n", 1)
        opcodes = [x.opcode for x in cuda_sass.instructions_of(body)]
        counts = {kind: sum(bool(re.match(p, o)) for o in opcodes) for kind, p in COUNTED.items()}
        result[name.strip()] |= {**counts, "instructions": len(opcodes), **cuda_sass.budget(body)}
    names = subprocess.run(["c++filt"], input="\n".join(result), capture_output=True, text=True, check=True).stdout
    return [{"kernel": short(n), **v} for n, v in zip(names.splitlines(), result.values(), strict=True)]


def resident_threads(launches):
    """{card: resident threads of a multiprocessor} for each (threads, registers, static, dynamic bytes) of a block."""
    with tempfile.TemporaryDirectory() as folder:
        program = f"{folder}/occupancy"
        source = str(ROOT / "tools" / "cuda_occupancy.cpp")
        subprocess.run(["g++", "-w", f"-I{cuda_home()}/include", source, "-o", program], check=True)
        lines = "\n".join(" ".join(map(str, launch)) for launch in launches)
        out = subprocess.run([program], input=lines, capture_output=True, text=True, check=True).stdout.splitlines()
    cards = out[0].split()
    return [
        {card: int(blocks) * launch[0] for card, blocks in zip(cards, line.split(), strict=True)}
        for launch, line in zip(launches, out[1:], strict=True)
    ]


def report(arch="sm_90"):
    with ThreadPoolExecutor(2) as pool:
        files = sorted((ROOT / "csrc").rglob("*.cu"))
        kernels = [k for found in pool.map(lambda f: kernels_of(f, arch), files) for k in found]
    resident = resident_threads([(k["threads"], k["registers"], k["shared"], 0) for k in kernels])
    return [k | r for k, r in zip(kernels, resident, strict=True)]


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
