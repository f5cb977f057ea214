"""Memory that a call needs besides its tensors: bounded for every shape, by the peak of the process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import for_cpu
from torch.profiler import ProfilerActivity, profile

import torch_softmax_ext as tse
from torch_softmax_ext.testing.memory import peak_memory

ROOT = Path(__file__).parent.parent
MIB = 2**20

# Prints by how many bytes the process grew beyond the tensors that the call returns: resident, and requested.
PROBE = """
import re, sys, torch, torch_softmax_ext as tse

def status(key):
    return int(re.search(key + r":\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024

def grows(function):
    function(*arguments(1000))  # threads, code and the allocator's first pages
    args = arguments({size})
    open("/proc/self/clear_refs", "w").write("5")  # resets the peak
    before, asked = status("VmRSS"), status("VmPeak")
    kept = sum(t.nbytes for t in function(*args))
    return status("VmHWM") - before - kept, status("VmPeak") - asked - kept

torch.set_num_threads(2)

def arguments(size):
    return {arguments}

def function({names}):
    {body}

print(*grows(function))
"""

FORWARD = "return [{call}]"
BACKWARD = """x.requires_grad_()
    y = {call}
    return [y.detach(), *torch.autograd.grad(y, x, torch.ones(()).expand_as(y))]
"""

SPARSEMAX = ("x", "(torch.randn(size, 16),)", "tse.sparsemax(x, 0)")
ROW = ("x", "(torch.randn(size, 2)[:, 0],)", "tse.sparsemax(x)")
IMAGE = ("x, t", "(torch.randn(2, size, 16), torch.zeros(2, 16, dtype=torch.long))", "tse.cross_entropy(x, t{options})")
SMOOTHED = ", label_smoothing=0.1"


@for_cpu
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux' account of the peak")
@pytest.mark.parametrize(
    ("case", "size", "body", "options", "bound"),
    [
        # Two threads, each with tiles of one row, as a row is longer than 2 MiB.
        pytest.param(SPARSEMAX, 10**6, FORWARD, "", 2 * 2 * 4 * 10**6, id="sparsemax-columns"),
        pytest.param(SPARSEMAX, 10**6, BACKWARD, "", 2 * 3 * 4 * 10**6, id="sparsemax-columns-backward"),
        pytest.param(ROW, 2 * 10**7, FORWARD, "", 2 * 8 * 10**7, id="sparsemax-one-strided-row"),
        pytest.param(IMAGE, 5 * 10**5, FORWARD, "", 2 * 2 * MIB, id="cross-entropy-image"),
        pytest.param(IMAGE, 5 * 10**5, BACKWARD, "", 2 * 2 * MIB, id="cross-entropy-image-backward"),
        pytest.param(IMAGE, 5 * 10**5, BACKWARD, SMOOTHED, 2 * 2 * MIB, id="cross-entropy-image-smoothing"),
    ],
)
def test_scratch_is_bounded(case, size, body, options, bound):
    names, arguments, call = case
    code = PROBE.format(
        size=size, names=names, arguments=arguments, body=body.format(call=call.format(options=options))
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr[-2000:]
    resident, asked = map(int, run.stdout.split())
    assert resident <= bound + 12 * MIB, run.stdout  # candidates, autograd, the allocator
    assert asked <= bound + 160 * MIB, run.stdout  # the allocator's arenas, one for each thread


@pytest.mark.on_host
@pytest.mark.parametrize("shape", [(8, 10), (4000, 10), (8, 3000)])
def test_scratch_on_cuda_grows_with_the_grid_alone(shape):
    x, target = torch.randn(shape), torch.randint(0, shape[1], shape[:1])
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        tse.cross_entropy(x, target)
    allocated = [e.cpu_memory_usage for e in profiled.events() if e.name == "aten::empty"]
    statistics = 4 * 4 * shape[0] + 3 * 8
    assert sum(allocated) <= statistics + 16 * 4 * 32 + 200  # 32 bytes a block, 16 blocks on each of 4 multiprocessors


@pytest.mark.on_host
@pytest.mark.parametrize("loss", [tse.sparsemax_loss, tse.entmax15_loss, tse.entmax_loss])
def test_losses_on_cuda_store_no_probabilities(loss):
    x, target = torch.randn(8, 3000, requires_grad=True), torch.randint(0, 3000, (8,))
    assert peak_memory(lambda: loss(x, target)) <= 2048
    assert peak_memory(lambda: loss(x, target).backward()) <= x.nbytes + 2048  # the gradient
