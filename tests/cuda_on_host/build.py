"""Compiles the CUDA kernels as C++ for the host: the whole library (with torch), or the program of kernels_main.cpp
under a sanitizer, with a bug planted in one file where wanted.

What was made stays in build/cuda_on_host, named by the hash of all that went into it: compiler, flags, versions of
torch and CUDA, a file and the project's files that it includes. So nothing is compiled twice, by whichever process or
run, and a planted bug shares every object that does not see its file.
"""

import contextlib
import fcntl
import functools
import hashlib
import importlib.util
import os
import re
import runpy
import shlex
import subprocess
import sysconfig
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
CSRC = ROOT / "csrc"
BUILD = ROOT / "build" / "cuda_on_host"
DAYS_KEPT = 14  # after its last use
JOBS = int(os.environ.get("MAX_JOBS") or os.cpu_count())


@functools.cache
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


@functools.cache
def environment():
    """What objects depend on beside the project's files and the flags."""
    compiler = subprocess.run(["g++", "--version"], capture_output=True, text=True, check=True).stdout
    return f"{compiler} {cuda_include()} {(cuda_include() / 'cuda_fp16.hpp').read_text()}"


def with_includes(name, planted):
    """{name: text} of a file and of the project's files that it includes, by name or through a macro."""
    found, names = {}, [name]
    while names:
        name = names.pop()
        path = next((folder / name for folder in (CSRC, HERE) if (folder / name).is_file()), None)
        if path is not None and name not in found:
            found[name] = planted.get(name) or path.read_text()
            names += re.findall(r'"([\w./-]+)"', found[name])
    return found


def made(suffix, what, make):
    """The path of what `make(path)` makes from all that `what` names: made once, by whoever comes first."""
    path = BUILD / (hashlib.sha256(what.encode()).hexdigest()[:24] + suffix)
    BUILD.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        with open(path.with_suffix(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not path.exists():
                make(path.with_suffix(".new"))
                path.with_suffix(".new").rename(path)
    os.utime(path)
    return path


def run_compiler(command):
    run = subprocess.run(["g++", *shlex.split(command)], capture_output=True, text=True)
    if run.returncode != 0:
        raise RuntimeError(f"g++ {command} failed:\n{run.stderr[:3000]}")


def compiled(name, flags, planted):
    """The object of a file of csrc or of this folder."""
    flags += " -fno-strict-aliasing -ffp-contract=off -Wno-unknown-pragmas -DTSE_CUDA_ON_HOST"
    flags += " -x c++" if name.endswith(".cu") else ""
    texts = with_includes(name, planted)

    def compile(output):
        with tempfile.TemporaryDirectory() as folder:  # found first
            for file in planted.keys() & texts.keys():
                (Path(folder) / file).parent.mkdir(parents=True, exist_ok=True)
                (Path(folder) / file).write_text(planted[file])
            source = next(f / name for f in (Path(folder), CSRC, HERE) if (f / name).exists())
            run_compiler(f"{flags} -I{folder} -I{CSRC} -I{HERE} -isystem {cuda_include()} -c {source} -o {output}")

    return made(".o", f"{environment()} {flags} {sorted(texts.items())}", compile)


def linked(suffix, objects, link, planted=None, others=()):
    """A program or library of (file, flags) pairs and of other objects."""
    with ThreadPoolExecutor(JOBS) as pool:
        paths = list(pool.map(lambda o: compiled(*o, planted or {}), objects))
    files = " ".join(map(str, [*paths, *others]))
    what = f"{environment()} {files} {[hashlib.sha256(o.read_bytes()).hexdigest() for o in others]} {link}"
    return made(suffix, what, lambda output: run_compiler(f"{files} -o {output} {link}"))


def forget_the_unused():
    for path in BUILD.glob("*"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > DAYS_KEPT * 86400:
                path.unlink()


def object_of_the_package(source):
    """What the package's own build made of a C++ file; None where a file that it includes has changed since."""
    built = ROOT / "build" / "temp" / source.relative_to(ROOT).with_suffix(".o")
    files = [CSRC / name for name in with_includes(str(source.relative_to(CSRC)), {})]
    is_new = built.exists() and built.stat().st_mtime > max(f.stat().st_mtime for f in files)
    return built if is_new else None


def library():
    """The package's library with CUDA kernels that run on CPU tensors. Only device.cpp differs from the package's C++
    files; the objects of the others are taken from the package's build, where they are up to date."""
    import torch
    from torch.utils.cpp_extension import include_paths, library_paths

    forget_the_unused()
    host = (
        f"-std=c++20 -O0 -g0 -fPIC -fopenmp -D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())} "
        f"-DTSE_TORCH={torch.__version__} "  # so that another version's objects are others
        + " ".join(f"-isystem {p}" for p in [*include_paths(), sysconfig.get_path("include")])
    )
    built = {p: object_of_the_package(p) for p in CSRC.rglob("*.cpp") if p.name != "device.cpp"}
    objects = [(str(p.relative_to(CSRC)), host) for p, found in sorted(built.items()) if found is None]
    objects += [(str(p.relative_to(CSRC)), "-std=c++20 -O1 -fPIC") for p in sorted(CSRC.rglob("*.cu"))]
    objects += [("device.cpp", host), ("executor.cpp", "-std=c++20 -O2 -fPIC")]
    others = sorted(filter(None, built.values()))
    paths = " ".join(f"-L{p} -Wl,-rpath,{p}" for p in library_paths())
    link = f"-shared -fopenmp {paths} -lc10 -ltorch -ltorch_cpu -ltorch_python"
    return linked(".so", objects, link, others=others)


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


def folders_of(operator):
    """The folders of csrc whose kernels the checks of an operator call, directly or through other kernels."""
    folders, names = {"common/cuda"}, [f"kernels_{operator}.cpp"]
    while names:
        found = {Path(name).parent.name for name in with_includes(names.pop(), {}) if Path(name).suffix == ".h"}
        for folder in found - folders - {"", "common"}:
            folders.add(folder)
            names += [f"{folder}/{p.name}" for p in (CSRC / folder).glob("*.cu")]
    return folders


def program(mode, plant=None):
    """kernels_main under a sanitizer, with the checks of all operators; with a bug of plants.py, those of its operator
    alone. The bug's pattern must match exactly once."""
    kernels, executor, link = SANITIZERS[mode]
    planted = {}
    folders = {p.parent.relative_to(CSRC).as_posix() for p in CSRC.rglob("*.cu")}
    checks = sorted(p.name for p in HERE.glob("kernels_*.cpp"))
    if plant is not None:
        planted[plant.file], count = re.subn(
            plant.pattern, plant.replacement, (CSRC / plant.file).read_text(), flags=re.M
        )
        assert count == 1, f"the planted bug {plant} matches {count} places"
        folders &= folders_of(plant.operator)
        checks = ["kernels_main.cpp", f"kernels_{plant.operator}.cpp"]
    # The kernels alone are instrumented: the executor tells the sanitizers what its fibres do, and the checks, whose
    # blocks of memory are guarded as they are, would take a minute to compile. Kernels first: of an inline function
    # that both have, the linker takes the first.
    sources = [f"{folder}/{p.name}" for folder in sorted(folders) for p in sorted((CSRC / folder).glob("*.cu"))]
    objects = [(source, f"-std=c++17 -g {kernels}") for source in sources]
    objects += [(check, "-std=c++17 -O1 -g" + " -DTSE_BANKS" * (mode == "banks")) for check in checks]
    objects += [("executor.cpp", f"-std=c++17 -O1 -g {executor}")]
    objects += [("banks.cpp", "-std=c++17 -O1 -g")] if mode == "banks" else []
    return linked("", objects, link, planted)
