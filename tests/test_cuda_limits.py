"""How various cards work on a row, and how much of it they keep: csrc/common/cuda/plan.h, compiled as C++."""

import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).parent.parent / "csrc"
PROGRAM = """
#include <cstdio>
#include <cstdlib>
#include "common/cuda/plan.h"
int main(int, char** v) {
  const auto number = [v](int i) { return std::atoll(v[i]); };
  const tse::DeviceLimits limits = {int(number(1)), int(number(2)), number(3), number(4)};
  if (number(5) == 0) {  // the plan of a row
    const tse::RowPlan plan = tse::plan_row(limits, number(6), number(7), number(8), number(9), number(10));
    std::printf("%d %d %d", plan.threads, plan.vectors, tse::kept_vectors(limits, number(6) * number(7) / 16, 1));
    return 0;
  }
  const long kept = tse::kept_bytes(limits, number(6));
  std::printf("%ld %ld %ld", kept, long(tse::resident_blocks(limits, int(number(5)), kept)),
              long(tse::shared_for_rows(limits, 2)));
}
"""
KIB = 1024
CARDS = {  # multiprocessors, threads per multiprocessor, shared memory per block and per multiprocessor
    "T4": (40, 1024, 64 * KIB, 64 * KIB),
    "A100": (108, 2048, 163 * KIB, 164 * KIB),
    "RTX 4090": (128, 1536, 99 * KIB, 100 * KIB),
    "H100": (132, 2048, 227 * KIB, 228 * KIB),
    "B200": (148, 2048, 227 * KIB, 228 * KIB),
}
cards = pytest.mark.parametrize("card", CARDS)


@pytest.fixture(scope="module")
def layout(tmp_path_factory):
    folder = tmp_path_factory.mktemp("limits")
    (folder / "main.cpp").write_text(PROGRAM)
    subprocess.run(["g++", "-std=c++17", f"-I{CSRC}", folder / "main.cpp", "-o", folder / "main"], check=True)

    def run(card, threads, row_bytes, *more):
        """Bytes of the row that are kept, blocks per multiprocessor, and the longest row of which it keeps two."""
        command = [folder / "main", *map(str, (*CARDS[card], threads, row_bytes, *more))]
        return map(int, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())

    return run


@cards
@pytest.mark.parametrize("threads", [128, 512, 1024])
@pytest.mark.parametrize("row_bytes", [16, 2050, 32000 * 2, 50257 * 2, 113 * KIB, 128256 * 2, 128256 * 4, 2**40])
def test_the_card_has_what_is_asked_for(layout, card, threads, row_bytes):
    _, most_threads, per_block, per_multiprocessor = CARDS[card]
    kept, blocks, _ = layout(card, threads, row_bytes)
    assert 0 < kept <= row_bytes
    assert kept + 5 * KIB <= per_block  # 5 KiB: reductions and the system
    assert blocks * (kept + 5 * KIB) <= per_multiprocessor
    assert 1 <= blocks <= max(1, most_threads // threads)
    assert kept == row_bytes or blocks == 1


@cards
def test_the_longest_row_of_which_a_multiprocessor_keeps_two(layout, card):
    *_, longest = layout(card, 512, 16)
    assert [list(layout(card, 512, n))[:2] for n in (longest, longest + 1)] == [[longest, 2], [longest + 1, 1]]


def test_known_rows_on_h100(layout):
    assert [*layout("H100", 512, 32000 * 2)][:2] == [64000, 3]
    assert [*layout("H100", 512, 50257 * 2)][:2] == [100514, 2]
    assert [*layout("H100", 1024, 128256 * 2)][:2] == [221 * KIB, 1]  # the rest, of all blocks 4.5 MB, is in L2


def test_small_rows_do_not_cost_threads(layout):
    assert [*layout("H100", 128, 2050)][:2] == [2050, 16]


@pytest.fixture(scope="module")
def plan(layout):
    def run(card, n, element_bytes, contiguous=True, in_registers=True, keeps=True):
        """Threads of a row, vectors in registers of each, vectors that a block may keep in shared memory."""
        return tuple(layout(card, 0, n, element_bytes, int(contiguous), int(in_registers), int(keeps)))

    return run


@cards
@pytest.mark.parametrize("element_bytes", [2, 4])
def test_short_rows_are_in_registers(plan, card, element_bytes):
    most = 128 * 16 * 16 // element_bytes
    for n in (1, 7, 64, 65, 256, 257, 1000, 1024, 4096, 4097, most):
        threads, vectors, _ = plan(card, n, element_bytes)
        assert vectors > 0
        assert threads * vectors >= n * element_bytes // 16
    assert plan(card, 64, element_bytes)[0] < 32
    threads, vectors, _ = plan(card, most + 16 // element_bytes, element_bytes)
    assert threads >= 512
    assert vectors == 0


@cards
@pytest.mark.parametrize("element_bytes", [2, 4, 8])
def test_other_rows_have_a_warp_or_a_block(plan, card, element_bytes):
    """Whatever the card, with options or in float64; the longer the row, the more threads."""
    found = [plan(card, n, element_bytes, in_registers=False)[:2] for n in (10, 1024, 1025, 8192, 8193, 1 << 30)]
    assert [f[0] for f in found[:4]] == [32, 32, 128, 128]
    assert found[4][0] >= 512
    assert found[5][0] == (512 if element_bytes == 8 else 1024)
    assert all(f[1] == 0 for f in found)
    assert plan(card, 1 << 30, element_bytes, in_registers=False, keeps=False)[:2] == (512, 0)
    if element_bytes == 8:
        assert plan(card, 64, element_bytes)[:2] == (32, 0)


def test_rows_of_one_thread(plan):
    assert plan("H100", 64, 4, contiguous=False)[:2] == (1, 0)
    assert plan("B200", (1 << 31) + 1, 2)[:2] == (1, 0)  # too many elements to count in int


def test_known_plans_on_h100(plan):
    assert plan("H100", 256, 2)[:2] == (8, 4)
    assert plan("H100", 4096, 2)[:2] == (32, 16)
    assert plan("H100", 16384, 2)[:2] == (128, 16)
    assert plan("H100", 50257, 2) == (512, 0, 6282)  # kept whole: two blocks of a multiprocessor
    assert plan("H100", 131072, 2) == (1024, 0, 14144)
