"""What only a GPU shows of cross_entropy: blocks with several rows, device-side assertions, more than 2^31 elements."""

import subprocess
import sys

import pytest
import torch
from conftest import skip_without_memory
from test_cuda import value_and_grad

import torch_softmax_ext as tse

pytestmark = pytest.mark.gpu


@pytest.mark.sanitized
@pytest.mark.parametrize(("rows", "n"), [(9000, 33), (2500, 1100)])
def test_blocks_process_several_rows(rows, n):
    """More rows than the grid has blocks, with class weights, whose total a kernel of its own counts first."""
    x, target, weight = torch.randn(rows, n), torch.randint(0, n, (rows,)), torch.rand(n)
    want = value_and_grad(torch.nn.functional.cross_entropy, x.double(), target, weight.double())
    got = value_and_grad(tse.cross_entropy, x.cuda(), target.cuda(), weight.cuda())
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.double().cpu(), b, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("rows", [33000, pytest.param(1, marks=pytest.mark.full)])  # one long row takes minutes
def test_more_than_two_to_the_31_elements(rows):
    n = 2**31 // rows + 1000
    skip_without_memory(rows * n, torch.bfloat16, copies=4)
    x = torch.zeros(rows, n, device="cuda", dtype=torch.bfloat16)
    x[-1, -1] = 30
    target = torch.full((rows,), n - 1, device="cuda")
    loss = tse.cross_entropy(x, target, reduction="none")
    want = torch.tensor(n / 2.718281828**30 + 1).log().item()
    torch.testing.assert_close(loss[-1].item(), want, rtol=1e-3, atol=1e-6)
    if rows > 1:
        torch.testing.assert_close(loss[0].item(), torch.tensor(float(n)).log().item(), rtol=1e-4, atol=0)
    del loss
    x.requires_grad_()
    tse.cross_entropy(x, target, reduction="sum").backward()
    if rows > 1:
        torch.testing.assert_close(x.grad[0, 5].item(), 1 / n, rtol=1e-2, atol=0)
    assert -1e-2 < x.grad[-1, -1].item() <= 0


@pytest.mark.parametrize("weight", ["None", "torch.ones(5, device='cuda')"])
@pytest.mark.parametrize("target", [5, -1])
def test_target_outside_the_classes_stops_the_kernel(target, weight):
    code = (
        "import torch, torch_softmax_ext as tse\n"
        f"tse.cross_entropy(torch.zeros(2, 5, device='cuda'), torch.tensor([0, {target}], device='cuda'), {weight})\n"
        "torch.cuda.synchronize()\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode != 0
    assert "device-side assert" in run.stderr
    assert "cross_entropy: target" in run.stdout + run.stderr
