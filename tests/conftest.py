"""Parameters that tests share (devices, dtypes, specs, samples), and the tests that a run leaves out."""

import os

# Several test processes share the cores, so idle threads must not spin. Two threads test as much as many.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch

from torch_softmax_ext.testing import SPECS
from torch_softmax_ext.testing.spec import FLOATING

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(2)

# Set by tests/test_cuda_on_host.py, which runs this suite on the CUDA kernels, executed on the host.
CUDA_ON_HOST = "TORCH_SOFTMAX_EXT_LIBRARY" in os.environ
for_cpu = pytest.mark.not_on_host  # a test of the CPU kernels
dtypes = pytest.mark.parametrize("dtype", FLOATING, ids=lambda d: str(d).removeprefix("torch."))
# On the host executor float16 and float64 are left to full runs, for the time they take.
dtypes_in_full_on_host = pytest.mark.parametrize(
    "dtype",
    [pytest.param(d, marks=pytest.mark.full_on_host) if d in (torch.float16, torch.float64) else d for d in FLOATING],
    ids=lambda d: str(d).removeprefix("torch."),
)
reductions = pytest.mark.parametrize("reduction", ["none", "mean", "sum"])


def specs_where(condition):
    return pytest.mark.parametrize("spec", [s for s in SPECS if condition(s)], ids=lambda s: s.name)


specs = specs_where(lambda spec: True)
SAMPLES = [(spec, sample.name) for spec in SPECS for sample in spec.samples("cpu", torch.float32)]
SMALL = [(spec, sample.name) for spec in SPECS for sample in spec.samples("cpu", torch.float64) if sample.small]
samples = pytest.mark.parametrize(("spec", "sample"), SAMPLES, ids=lambda v: v if isinstance(v, str) else v.name)
small_samples = pytest.mark.parametrize(("spec", "sample"), SMALL, ids=lambda v: v if isinstance(v, str) else v.name)


def get(spec, name, device, dtype):
    """The sample of this name."""
    return next(s for s in spec.samples(device, dtype) if s.name == name)


def first(spec, device, dtype):
    return next(spec.samples(device, dtype))


DEVICES = [pytest.param("cpu", id="cuda_on_host" if CUDA_ON_HOST else "cpu")]
if torch.cuda.is_available() and not CUDA_ON_HOST:
    DEVICES.append(pytest.param("cuda", marks=pytest.mark.gpu))


@pytest.fixture(params=DEVICES)
def device(request):
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def skip_without_memory(count, dtype, copies):
    """For tests on a GPU that hold `copies` tensors of `count` elements."""
    if torch.cuda.mem_get_info()[0] < count * dtype.itemsize * copies:
        pytest.skip("not enough memory on the card")


def is_of_use(item):
    """On the host executor: tests of a device, of operators with kernels. Elsewhere: all but those that need a GPU that
    is missing."""
    if item.get_closest_marker("on_host"):
        return CUDA_ON_HOST
    if not CUDA_ON_HOST:
        return torch.cuda.is_available() or not item.get_closest_marker("gpu")
    if "device" not in item.fixturenames or item.get_closest_marker("not_on_host"):
        return False
    spec = item.callspec.params.get("spec")
    return spec is None or spec.has_kernels


def pytest_collection_modifyitems(config, items):
    """Deselects what this run cannot use, so that a skip always means a missing tool. Long tests come first."""
    config.hook.pytest_deselected(items=[item for item in items if not is_of_use(item)])
    items[:] = [item for item in items if is_of_use(item)]
    items.sort(key=lambda item: not any(item.iter_markers("long")) and not any(item.iter_markers("full")))
