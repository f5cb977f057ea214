"""What the compiler made of the CUDA kernels must not get worse: spills, 16-byte accesses, occupancy."""

import re

import pytest

from benchmarks import cuda_report

pytestmark = pytest.mark.skipif(not cuda_report.available(), reason="no CUDA toolkit, or no cuobjdump")


@pytest.fixture(scope="module")
def kernels():
    return cuda_report.report()


def test_every_kernel_is_there(kernels):
    names = {k["kernel"].split("<")[0] for k in kernels}
    for operator in ("cross_entropy", "sparsemax", "selective_log_softmax"):
        assert {f"{operator}_fwd_kernel", f"{operator}_bwd_kernel"} <= names
    assert len(kernels) > 100


def test_registers_suffice(kernels):
    """A word or two of spills, more in fp64, which is for checking gradients; room for enough threads."""
    for k in kernels:
        assert k["spills"] <= (64 if "<double" in k["kernel"] else 8), k
        assert k["resident"] >= 512, k


def test_rows_are_read_and_written_by_16_bytes(kernels):
    for k in kernels:
        threads = re.search(r"_(?:fwd|bwd)_kernel<[^,]*, (\d+)", k["kernel"])
        if threads is None or threads[1] == "1":  # one thread a row: neighbouring rows are read together
            continue
        if k["kernel"].startswith("sparsemax"):  # forward writes, and backward reads and writes, element by element
            continue
        assert k["ld128"] >= 1, k
        assert "_bwd_" not in k["kernel"] or k["st128"] >= 1, k
