"""Devices and dtypes, and which tests a run has a use for."""

import os

# Several test processes share the cores: a thread that waits for work must not spin, and two show what many would.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch

import torch_softmax_ext  # noqa: F401  (registers the operators)

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(2)

# Set by tests/test_cuda_on_host.py, which runs the suite once more on the CUDA kernels executed on the host.
CUDA_ON_HOST = "TORCH_SOFTMAX_EXT_LIBRARY" in os.environ
for_cpu = pytest.mark.not_on_host  # a test of the CPU kernels
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)

DEVICES = [pytest.param("cpu", id="cuda_on_host" if CUDA_ON_HOST else "cpu")]
if torch.cuda.is_available() and not CUDA_ON_HOST:
    DEVICES.append(pytest.param("cuda", marks=pytest.mark.gpu))


@pytest.fixture(params=DEVICES)
def device(request):
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def is_of_use(item):
    """On the host executor what a device computes with kernels of its own; elsewhere all that needs no missing GPU."""
    if item.get_closest_marker("on_host"):
        return CUDA_ON_HOST
    if not CUDA_ON_HOST:
        return torch.cuda.is_available() or not item.get_closest_marker("gpu")
    if "device" not in item.fixturenames or item.get_closest_marker("not_on_host"):
        return False
    spec = item.callspec.params.get("spec")
    return spec is None or spec.has_kernels


def pytest_collection_modifyitems(config, items):
    """Deselects tests that this run cannot use. Skips are left for missing tools, few enough to be read."""
    config.hook.pytest_deselected(items=[item for item in items if not is_of_use(item)])
    items[:] = [item for item in items if is_of_use(item)]
    items.sort(key=lambda item: not any(item.iter_markers("long")) and not any(item.iter_markers("full")))
