"""Compiles the CUDA kernels as C++ for the host: the whole library (with torch), or the program of kernels_main.cpp
under a sanitizer, from a copy of the sources into which a bug was planted where wanted."""

import importlib.util
import re
import runpy
import shutil
import subprocess
import sysconfig
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
BUILD = ROOT / "build" / "cuda_on_host"


def cuda_include():
    """NVIDIA's headers: of the toolkit, or of the pip package that torch's CUDA build brings; None where neither is."""
    home = runpy.run_path(str(ROOT / "setup.py"), run_name="setup_functions")["find_cuda_home"]()
    if home is not None:
        return Path(home) / "include"
    spec = importlib.util.find_spec("nvidia")
    for base in spec.submodule_search_locations if spec else ():
        for header in sorted(Path(base).glob("*/include/cuda_fp16.h")):
            if (header.parent / "vector_types.h").exists():
                return header.parent
    return None


def object_name(source):
    return f"{Path(source).parent.name}_{Path(source).name}.o"


def ninja(folder, objects, link, output):
    """Builds `output` from (source, flags) pairs; what is up to date stays."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [
        "rule cxx\n  command = g++ $flags -MMD -MF $out.d -c $in -o $out\n  depfile = $out.d\n  deps = gcc",
        f"rule link\n  command = g++ $in -o $out {link}",
    ]
    names = []
    for source, flags in objects:
        names.append(object_name(source))
        language = "-x c++ " if Path(source).suffix == ".cu" else ""
        lines.append(f"build {names[-1]}: cxx {source}\n  flags = {flags} {language}")
    lines.append(f"build {output}: link {' '.join(names)}")
    (folder / "build.ninja").write_text("\n".join(lines) + "\n")
    run = subprocess.run(["ninja", "-C", str(folder)], capture_output=True, text=True)
    if run.returncode != 0:
        raise RuntimeError(f"build in {folder} failed:\n{run.stdout[-3000:]}{run.stderr[-1000:]}")
    return folder / output


def kernel_flags(sources=ROOT / "csrc"):
    return (
        f"-fno-strict-aliasing -ffp-contract=off -Wno-unknown-pragmas -DTSE_CUDA_ON_HOST "
        f"-I{sources} -I{HERE} -isystem {cuda_include()}"
    )


def library():
    """The package's library with CUDA kernels that run on CPU tensors."""
    import torch
    from torch.utils.cpp_extension import include_paths, library_paths

    torch_flags = (
        f"-std=c++20 -O1 -g0 -fPIC -fopenmp -D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())} "
        + " ".join(f"-isystem {p}" for p in [*include_paths(), sysconfig.get_path("include")])
    )
    objects = [(HERE / "executor.cpp", f"-std=c++20 -O2 -fPIC {kernel_flags()}")]
    for source in sorted((ROOT / "csrc").rglob("*")):
        if source.suffix == ".cu":
            objects.append((source, f"-std=c++20 -O1 -fPIC {kernel_flags()}"))
        elif source.suffix == ".cpp":
            objects.append((source, f"{torch_flags} {kernel_flags()}"))
    paths = library_paths()
    link = (
        "-shared -fopenmp "
        + " ".join(f"-L{p} -Wl,-rpath,{p}" for p in paths)
        + " -lc10 -ltorch -ltorch_cpu -ltorch_python"
    )
    return ninja(BUILD / "library", objects, link, "_C.so")


SANITIZERS = {  # flags of the kernels, of the executor, of the linker
    "plain": ("-O1", "", ""),
    "asan": (
        "-O1 -fsanitize=address,undefined -fno-sanitize-recover=undefined",
        "-DTSE_ASAN",
        "-fsanitize=address,undefined",
    ),
    "tsan": ("-O1 -fsanitize=thread", "-DTSE_TSAN", "-fsanitize=thread"),
    # Every access calls banks.cpp. Optimised, 16 bytes might be loaded piece by piece, as no GPU would.
    "banks": ("-O0 -fsanitize=thread -fno-threadsafe-statics -DTSE_BANKS", "", "-no-pie"),
}


def sources_of(folder):
    """What each object of a finished build was made from, resolved."""
    output = subprocess.run(["ninja", "-C", folder, "-t", "deps"], capture_output=True, text=True, check=True).stdout
    made_of, files = {}, set()
    for line in output.splitlines():
        if line.startswith(" "):
            files.add((folder / line.strip()).resolve())
        elif line:
            files = made_of.setdefault(line.split(":")[0], set())
    return made_of


def program(mode, plant=None):
    """kernels_main under a sanitizer. `plant` is (name, file below csrc, regular expression, replacement): a bug that
    goes into a copy of the sources; the expression must match exactly once. What does not see it is not built again."""
    kernels, executor, link = SANITIZERS[mode]
    sources, folder, untouched = ROOT / "csrc", BUILD / mode, []
    if plant is not None:
        name, file, pattern, replacement = plant
        made_of = sources_of(program(mode).parent)
        untouched = [n for n in made_of if sources / file not in made_of[n]]
        folder = BUILD / f"{mode}-{name}"
        sources = folder / "csrc"
        shutil.rmtree(sources, ignore_errors=True)
        shutil.copytree(ROOT / "csrc", sources)
        text, count = re.subn(pattern, replacement, (sources / file).read_text(), flags=re.M)
        assert count == 1, f"the planted bug {name} matches {count} places of {file}"
        (sources / file).write_text(text)
    # The executor itself is never instrumented: it tells the sanitizers what its fibres do.
    own = [HERE / "executor.cpp", *([HERE / "banks.cpp"] if mode == "banks" else [])]
    objects = [(source, f"-std=c++17 -O1 -g {executor} {kernel_flags(sources)}") for source in own]
    objects += [
        (source, f"-std=c++17 -g {kernels} {kernel_flags(sources)}")
        for source in [*sorted(sources.rglob("*.cu")), HERE / "kernels_main.cpp"]
    ]
    built = [str(BUILD / mode / n) for n in untouched]
    objects = [o for o in objects if object_name(o[0]) not in untouched]
    return ninja(folder, objects, " ".join([*built, link]), "kernels_main")
