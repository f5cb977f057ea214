"""Devices and dtypes, and what the environment says of them."""

import os

import pytest
import torch

import torch_softmax_ext  # noqa: F401  (registers the operators)

# Set by tests/test_cuda_on_host.py, which runs the suite once more on the CUDA kernels executed on the host.
CUDA_ON_HOST = "TORCH_SOFTMAX_EXT_LIBRARY" in os.environ
for_cpu = pytest.mark.skipif(CUDA_ON_HOST, reason="for the CPU kernels")
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)


@pytest.fixture(
    params=[
        pytest.param("cpu", id="cuda_on_host" if CUDA_ON_HOST else "cpu"),
        pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")),
    ]
)
def device(request):
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
