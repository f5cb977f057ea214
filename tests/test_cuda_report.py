"""The compiled CUDA kernels do not get worse: no spills, 16-byte accesses, occupancy, instructions per byte."""

import inspect
import json
import re
import subprocess

import pytest
from cuda_on_host import build

from tools import cuda_report, cuda_sass
from torch_softmax_ext.testing import SPECS

needs_nvcc = pytest.mark.skipif(not cuda_report.available(), reason="no CUDA toolkit, or no cuobjdump")

MAPS = tuple(s.name for s in SPECS if s.bench_modes.get("forward") == "copy")  # write a row as long as they read


# A loop with two paths, a loop without wide accesses, and the branch to itself that ends functions.
SASS = """
  /*0000*/                   MOV R1, c[0x0][0x28] ;    /* 0x00000a0000017a02 */
  /*0010*/                   LDG.E.128.STRONG R4, desc[UR4][R2.64] ;
  /*0020*/               @P0 BRA 0x0060 ;
  /*0030*/                   FADD R4, R4, R5 ;
  /*0040*/                   MUFU.EX2 R4, R4 ;
  /*0050*/                   BRA 0x0090 ;
  /*0060*/                   MUFU.EX2 R4, R4 ;
  /*0070*/                   MUFU.EX2 R4, R4 ;
  /*0090*/                   STG.E.128 desc[UR4][R2.64], R4 ;
  /*00a0*/              @!P1 BRA 0x0010 ;
  /*00b0*/                   FADD R4, R4, R5 ;
  /*00c0*/               @P1 BRA 0x00b0 ;
  /*00d0*/                   EXIT ;
  /*00e0*/                   BRA 0x00e0 ;
"""


def test_budget_of_a_loop():
    (loop,) = cuda_sass.main_loops(cuda_sass.instructions_of(SASS))
    assert [x.address for x in loop] == [a for a in range(0x10, 0xB0, 0x10) if a != 0x80]
    shorter = [0x10, 0x20, 0x60, 0x70, 0x90, 0xA0]
    assert [x.address for x in cuda_sass.cheapest_path(loop)] == shorter  # the other path has 7
    got = cuda_sass.budget(SASS)
    assert (got["loop"], got["per16"], got["busiest"]) == (6, 3.0, "mufu")
    assert got["budget"] == round(2 * 8 / (2 * 142), 2)
    assert cuda_sass.budget(SASS.replace("LDG.E.128", "LDG.E.64"))["budget"] == 0  # no main loop
    # Two loads, one of which runs, and the store: three instructions of 4 cycles for two accesses.
    either = SASS.replace("      FADD R4, R4, R5 ;", "@!P2 LDG.E.128 R4 ;").replace("      LDG", "@P2 LDG")
    assert cuda_sass.budget(either)["budget"] == round(3 * 4 / (2 * 142), 2)


@needs_nvcc
def test_occupancy_of_known_blocks():
    """One block of 200 KiB on an H100, none on a T4; registers limit 1024 threads of 64 to one block."""
    found = cuda_report.resident_threads([(512, 32, 0, 200 * 1024), (1024, 64, 0, 0), (128, 32, 0, 0)])
    assert [f["H100"] for f in found] == [512, 1024, 2048]
    assert [f["T4"] for f in found] == [0, 1024, 1024]
    assert found[2]["RTX4090"] == 1536


# Operators whose kernels share a name with others', by their template arguments.
BY_ARGUMENT = {"SparsemaxPolicy": "sparsemax", "Entmax15Policy": "entmax15", "AlphaGradient": "entmax",
               "SoftmaxWeights": "softmax", "LogSoftmaxGradient": "log_softmax"}  # fmt: skip


def named_by_operator(kernel):
    """Its name, with the operator's in place of the one that it shares."""
    name = kernel.split("<")[0]
    name = re.sub(r"^any_alpha(?=_)", "entmax", name)
    argument = next((a for a in BY_ARGUMENT if re.search(rf"\b{a}<", kernel)), None)
    return re.sub(r"^(entmax|row_map)(?=_)", BY_ARGUMENT[argument], name) if argument else name


@pytest.fixture(scope="module")
def kernels():
    """Cached like the objects of the host executor."""
    nvcc = f"{cuda_report.cuda_home()}/bin/nvcc"
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    texts = [p.read_text() for p in sorted(build.CSRC.rglob("*")) if p.suffix in (".h", ".cuh", ".cu")]
    tools = inspect.getsource(cuda_report) + inspect.getsource(cuda_sass)
    made = build.made(".json", f"{version}{tools}{texts}", lambda p: p.write_text(json.dumps(cuda_report.report())))
    return json.loads(made.read_text())


@pytest.mark.full
@needs_nvcc
def test_the_report_covers_every_operator(kernels):
    names = {named_by_operator(k["kernel"]) for k in kernels}
    names |= {n.replace("softmax", "log_softmax") for n in names if n.startswith("softmax_fwd")}  # one kernel for both
    for operator in (s.name for s in SPECS if s.has_kernels):
        own = re.sub("(sparsemax|entmax15)_loss", "entmax_loss", operator)
        assert {f"{own}_fwd_kernel", f"{own}_bwd_kernel"} <= names, operator
    assert len(kernels) > 100


@pytest.mark.full
@needs_nvcc
def test_no_spills_and_enough_resident_threads(kernels):
    """No spills, and room for enough threads; fewer in fp64, which serves to check gradients."""
    for k in kernels:
        assert k["spills"] == 0, k
        least = 256 if "<double" in k["kernel"] else 512
        assert min(k[card] for card in ("T4", "A100", "RTX4090", "H100", "B200")) >= least, k


@pytest.mark.full
@needs_nvcc
def test_main_loops_keep_up_with_memory(kernels):
    """The loop takes less than what an H100 issues while its memory moves the bytes. Kernels with options (`true`) do
    more work, and those for short rows do all of it in the loop."""
    for k in kernels:
        if "<double" in k["kernel"]:  # serves to check gradients
            continue
        in_registers = re.search(r"_kernel<[^,]*, \d+, [1-9]", k["kernel"])
        allowed = 1.8 if k["kernel"].endswith("true>") else 0.95 if in_registers else 0.7
        assert k["budget"] <= allowed, k


@pytest.mark.full
@needs_nvcc
def test_rows_are_read_and_written_by_16_bytes(kernels):
    for k in kernels:
        threads = re.search(r"_(?:fwd|bwd)(?:_block)?_kernel<[^,]*, (\d+)", k["kernel"])
        if threads is None or threads[1] == "1":  # one thread a row: a warp reads 32 rows together
            continue
        assert k["ld128"] >= 1, k
        is_map = named_by_operator(k["kernel"]).startswith(MAPS) and "_loss_" not in k["kernel"]
        writes = "_bwd_" in k["kernel"] or is_map
        assert not writes or k["st128"] >= 1, k
