"""How much of a row various cards keep in shared memory: csrc/common/cuda/limits.h, compiled as C++."""

import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).parent.parent / "csrc"
PROGRAM = """
#include <cstdio>
#include <cstdlib>
#include "common/cuda/limits.h"
int main(int, char** v) {
  const auto number = [v](int i) { return std::atoll(v[i]); };
  const tse::DeviceLimits limits = {int(number(1)), int(number(2)), number(3), number(4)};
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

    def run(card, threads, row_bytes):
        """Bytes of the row that are kept, blocks per multiprocessor, and the longest row of which it keeps two."""
        command = [folder / "main", *map(str, (*CARDS[card], threads, row_bytes))]
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
