"""Builds torch_softmax_ext._C: CPU kernels always, CUDA kernels where nvcc matches the CUDA version of torch.

Environment: FORCE_CUDA=1 (fail instead of falling back to CPU only), FORCE_CUDA=0 (CPU only), CUDA_HOME,
TORCH_CUDA_ARCH_LIST, MAX_JOBS. A visible GPU is not needed. For development without one: PTX_ONLY=1 compiles kernels
to PTX that is not optimised, which shows whether they compile, in a third of the time; LEAVE_OUT_CUDA_KERNELS=1 builds
all but the kernels: a later build adds them and compiles nothing again.
"""

import os
import re
import shutil
import subprocess
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
# Turing to Blackwell. A visible GPU or TORCH_CUDA_ARCH_LIST replaces it.
DEFAULT_ARCHITECTURES = "7.5;8.0;8.6;8.9;9.0;10.0;12.0+PTX"
ARCHITECTURES_BEFORE_12_8 = "7.5;8.0;8.6;8.9;9.0+PTX"


def find_cuda_home():
    """The toolkit's folder, or None. nvcc on PATH may be a wrapper script, so its --dryrun is asked, too."""
    candidates = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    nvcc = shutil.which("nvcc")
    if nvcc:
        candidates.append(Path(nvcc).resolve().parent.parent)
        dryrun = subprocess.run([nvcc, "--dryrun", "-x", "cu", "-c", os.devnull], capture_output=True, text=True)
        top = re.search(r"^#\$ TOP=(.*)$", dryrun.stderr, re.M)
        candidates.append(os.path.normpath(top[1]) if top else None)
    candidates.append("/usr/local/cuda")
    for candidate in candidates:
        if candidate and all((Path(candidate) / f).exists() for f in ("include/cuda_runtime.h", "bin/nvcc")):
            return str(candidate)
    return None


def choose_cuda():
    """(with_cuda, why): whether CUDA kernels are built, and the reason."""
    force = os.environ.get("FORCE_CUDA")
    if force == "0":
        return False, "FORCE_CUDA=0"
    import torch

    if torch.version.cuda is None:
        why = f"torch {torch.__version__} has no CUDA"
    elif (home := find_cuda_home()) is None:
        why = "no CUDA toolkit found (nvcc on PATH or CUDA_HOME)"
    else:
        out = subprocess.run([Path(home) / "bin" / "nvcc", "--version"], capture_output=True, text=True).stdout
        release = re.search(r"release (\d+)\.(\d+)", out)
        if release and release[1] == torch.version.cuda.split(".")[0]:
            os.environ["CUDA_HOME"] = home
            if "TORCH_CUDA_ARCH_LIST" not in os.environ and not torch.cuda.is_available():
                is_new = (int(release[1]), int(release[2])) >= (12, 8)
                os.environ["TORCH_CUDA_ARCH_LIST"] = DEFAULT_ARCHITECTURES if is_new else ARCHITECTURES_BEFORE_12_8
            return True, f"toolkit {release[1]}.{release[2]} in {home}, torch for CUDA {torch.version.cuda}"
        found = f"{release[1]}.{release[2]}" if release else "an unknown version"
        why = f"nvcc in {home} is {found}, torch is built for CUDA {torch.version.cuda}"
    if force == "1":
        raise SystemExit(f"torch_softmax_ext: FORCE_CUDA=1, but {why}")
    return False, why


def extension():
    with_cuda, why = choose_cuda()
    print(f"torch_softmax_ext: building {'CPU and CUDA' if with_cuda else 'CPU only'} kernels: {why}", flush=True)

    from torch.utils.cpp_extension import CppExtension, CUDAExtension

    with_kernels = with_cuda and os.environ.get("LEAVE_OUT_CUDA_KERNELS") != "1"
    suffixes = (".cpp", ".cu") if with_kernels else (".cpp",)
    sources = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*") if p.suffix in suffixes)
    # Without OpenMP at::parallel_for is serial. At run time torch's libgomp.so.1 is used.
    cxx = ["-O3", "-g0", "-fopenmp", "-fvisibility=hidden", "-Wall", "-Wno-unknown-pragmas"]
    nvcc = ["-O3", "--threads=2", "-Xcompiler=-fvisibility=hidden"]
    if os.environ.get("PTX_ONLY") == "1":
        nvcc += ["-gencode=arch=compute_90,code=compute_90", "-Xcicc=-O0"]  # in place of torch's list of architectures
    macros = [("TSE_WITH_CUDA", None)] if with_cuda else []
    build = CUDAExtension if with_cuda else CppExtension
    return build(
        "torch_softmax_ext._C",
        sources,
        include_dirs=[str(ROOT / "csrc")],
        define_macros=macros,
        extra_compile_args={"cxx": cxx, "nvcc": nvcc},
        extra_link_args=["-fopenmp", "-Wl,--no-undefined-version", "-s"],
    )


def build_ext():
    from torch.utils.cpp_extension import BuildExtension

    class Build(BuildExtension):
        def finalize_options(self):
            super().finalize_options()
            self.build_temp = str(ROOT / "build" / "temp")  # pip's own is temporary: all would be compiled again

    return Build.with_options(use_ninja=True)


if __name__ == "__main__":
    setup(ext_modules=[extension()], cmdclass={"build_ext": build_ext()})
