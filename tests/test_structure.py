"""House rules: what may include what, and that every operator has all of its parts."""

import inspect
import pkgutil
import re
import subprocess
from pathlib import Path

import pytest
import torch

import torch_softmax_ext as tse
from torch_softmax_ext.testing import SPECS

ROOT = Path(__file__).parent.parent
CSRC = ROOT / "csrc"
TORCH = re.compile(r"^(torch|ATen|c10)/")
CUDA = re.compile(r"^(cuda|vector_types)")
NAMESPACE = "torch_softmax_ext"


def kind(path):
    """[plain], [per ISA], [CUDA] or [torch] of docs/architecture.md, by the file's name."""
    if path.suffix in (".cu", ".cuh") or path.match("common/cuda/*"):
        return "cuda"
    if path.name.endswith("-inl.h") or path.name == "foreach_isa.h":
        return "isa"
    if path.name.endswith("_cpu.cpp") or path.match("common/cpu/*"):
        return "plain"
    if path.name in ("types.h", "row_params.h", "exp_sum.h"):
        return "plain"
    if path.suffix == ".h" and path.parent.name != "common" and not path.name.endswith("_host.h"):
        return "plain"
    return "torch"


def includes(path, seen=None):
    """All headers that a file includes, directly or through the project's own headers."""
    seen = set() if seen is None else seen
    for name in re.findall(r'^\s*#\s*include\s+[<"]([^>"]+)[>"]', path.read_text(), re.M):
        if name in seen:
            continue
        seen.add(name)
        if (CSRC / name).exists():
            includes(CSRC / name, seen)
    return seen


FILES = sorted(p for p in CSRC.rglob("*") if p.suffix in (".h", ".cpp", ".cu", ".cuh"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(CSRC)))
def test_include_rule(path):
    found, k = includes(path), kind(path)
    if k != "torch":
        assert not [n for n in found if TORCH.match(n)], "only host entries and autograd files know torch"
    if k in ("plain", "isa"):
        assert not [n for n in found if CUDA.match(n)]
    if k == "isa" and path.name != "foreach_isa.h":
        assert all(n.endswith("-inl.h") for n in found), (
            "what is compiled once per level: foreach_isa.h includes the rest"
        )


def test_only_launch_h_launches():
    assert [p.name for p in FILES if "<<<" in re.sub(r"//.*", "", p.read_text())] == ["launch.h"]


@pytest.mark.parametrize("path", sorted(CSRC.rglob("*_cpu.cpp")), ids=lambda p: p.name)
def test_kernels_are_cpp17(path):
    """Torch 2.11 compiles extensions as C++17; later versions as C++20."""
    command = ["g++", "-std=c++17", "-fsyntax-only", "-I", CSRC, path]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[:2000]


def test_no_intrinsics_outside_the_vector_headers():
    assert {p.name for p in FILES if "_mm" in p.read_text()} == {"vec_types-inl.h", "vec-inl.h"}


def schemas():
    return [s for s in torch._C._jit_get_all_schemas() if s.name.startswith(NAMESPACE + "::")]


def test_variants_have_tests():
    for spec in SPECS:
        texts = [p.read_text() for p in (ROOT / "tests").glob(f"test_{spec.name}*.py")]
        for variant in spec.variants:
            assert any(variant in text for text in texts), variant


def test_every_schema_has_its_kernels():
    """CPU, CUDA and Meta for each operator; CUDA where this build has it; autograd for the public ones."""
    names = {s.name for s in schemas()} - {f"{NAMESPACE}::_cpu_isa", f"{NAMESPACE}::_has_cuda"}
    public = {n.split("::")[1] for n in names if not n.split("::")[1].startswith("_")}
    assert {name for s in SPECS for name in (s.name, *s.variants)} == public
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    for name in names:
        assert has(name, "CPU"), name
        assert has(name, "CUDA"), name
        assert has(name, "Meta"), name
        if not name.split("::")[1].startswith("_"):
            assert has(name, "Autograd"), name
            assert has(name, "FuncTorchBatched"), name


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.name)
def test_documentation_of_the_operator(spec):
    assert spec.name in tse.__all__
    assert spec.module is None or spec.module.__name__ in tse.__all__
    for word in (r".. math::", "Args:", "Returns:", "Raises:", "shape"):
        assert word in spec.op.__doc__, word
    for argument in inspect.signature(spec.op).parameters:
        assert f"{argument}:" in spec.op.__doc__, f"{argument} is not documented"


def test_long_files_say_why():
    """400 lines of C++ and 300 of Python are an alarm. A longer file gives its reason in its head: "Long: …"."""
    files = [*FILES, *(ROOT / "torch_softmax_ext").rglob("*.py")]
    for path in files:
        lines = path.read_text().splitlines()
        assert len(lines) <= (300 if path.suffix == ".py" else 400) or "Long:" in "".join(lines[:15]), path


def test_no_module_shadows_a_public_name():
    modules = {m.name for m in pkgutil.iter_modules(tse.__path__)}
    assert not modules & set(tse.__all__)


def test_all_is_sorted_and_importable():
    assert sorted(tse.__all__) == list(tse.__all__)
    for name in tse.__all__:
        assert getattr(tse, name).__doc__
