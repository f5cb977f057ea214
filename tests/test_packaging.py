"""The source distribution holds all that a build needs, and the wheel built from it works."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = ("csrc", "torch_softmax_ext", "tests", "benchmarks", "docs", "tools", "examples")
NOT_COPIED = shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info")


def run(*command, cwd):
    path = f"{sysconfig.get_path('scripts')}:{os.environ['PATH']}"  # ninja compiles in parallel
    environment = {**os.environ, "PATH": path, "FORCE_CUDA": "0"}
    done = subprocess.run(list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    """Built from a copy, as setuptools would add files that an earlier build in the same folder listed."""
    source = tmp_path_factory.mktemp("sdist") / "source"
    source.mkdir()
    for folder in SOURCES:
        shutil.copytree(ROOT / folder, source / folder, ignore=NOT_COPIED)
    for file in filter(Path.is_file, ROOT.iterdir()):
        shutil.copy(file, source)
    run(sys.executable, "-c", "from setuptools import build_meta; build_meta.build_sdist('dist')", cwd=source)
    (archive,) = (source / "dist").glob("*.tar.gz")
    return archive


def test_the_sdist_holds_every_source(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    files = {p.relative_to(ROOT) for folder in SOURCES for p in (ROOT / folder).rglob("*") if p.is_file()}
    wanted = {str(p) for p in files if p.suffix not in (".so", ".pyc")}
    wanted |= {"LICENSE", "README.md", "CONTRIBUTING.md", "Makefile", "pyproject.toml", "setup.py"}
    assert wanted - names == set()
    assert not [n for n in names if n.endswith((".so", ".pyc"))]


CALL = """
import torch, torch_softmax_ext as tse
x, target = torch.randn(5, 9, requires_grad=True), torch.arange(5)
loss = tse.cross_entropy(x, target)
loss.backward()
torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(x, target))
print(tse.__file__)
"""


@pytest.mark.full
def test_the_wheel_built_from_the_sdist_works(sdist, tmp_path):
    """In a fresh environment that sees this one's torch."""
    pip = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")
    offline = ("--no-index", "--no-deps")
    run(*pip, "wheel", *offline, "--no-build-isolation", "--wheel-dir", tmp_path, sdist, cwd=tmp_path)
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv", cwd=tmp_path)
    python = tmp_path / "venv" / "bin" / "python"
    installed = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).strip())
    (installed / "torch_of_this_environment.pth").write_text(sysconfig.get_path("purelib"))
    (wheel,) = tmp_path.glob("*.whl")
    run(*pip, "--python", python, "install", *offline, wheel, cwd=tmp_path)
    assert Path(run(python, "-c", CALL, cwd=tmp_path).strip()).is_relative_to(installed)
