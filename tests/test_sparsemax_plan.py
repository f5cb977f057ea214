"""Where sparsemax keeps a row on various cards: csrc/sparsemax/sparsemax_plan.h, compiled as C++."""

import subprocess

import pytest
from test_cuda_limits import CARDS, CSRC, KIB

PROGRAM = """
#include <cstdio>
#include <cstdlib>
#include "sparsemax/sparsemax_plan.h"
int main(int, char** v) {
  const auto number = [v](int i) { return std::atoll(v[i]); };
  const tse::DeviceLimits limits = {int(number(1)), int(number(2)), number(3), number(4)};
  const tse::SparsemaxPlan plan = tse::plan_sparsemax(limits, number(5), number(6), number(7));
  std::printf("%d %d %d", plan.row_threads, plan.elements, plan.kept);
}
"""
cards = pytest.mark.parametrize("card", CARDS)


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plan")
    (folder / "main.cpp").write_text(PROGRAM)
    subprocess.run(["g++", "-std=c++17", f"-I{CSRC}", folder / "main.cpp", "-o", folder / "main"], check=True)

    def run(card, n, element_bytes, shared_per_vector=16):
        """Threads per row, elements per thread in registers, vectors in shared memory."""
        command = [folder / "main", *map(str, (*CARDS[card], n, element_bytes, shared_per_vector))]
        return tuple(map(int, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()))

    return run


@cards
def test_rows_of_up_to_1024_elements_are_in_registers(plan, card):
    for element_bytes in (2, 4, 8):
        widths = (1, 64, 65, 256, 257, 512, 513, 1024)
        found = [plan(card, n, element_bytes) for n in widths]
        assert [f[0] * f[1] >= n for f, n in zip(found, widths, strict=True)] == [True] * 8
        assert found[0] == (4, 16, 0)
        assert found[-1] == (32, 32, 0)
        assert plan(card, 1025, element_bytes)[:2] == (128, 0)


@cards
@pytest.mark.parametrize("element_bytes", [2, 4, 8])
@pytest.mark.parametrize("shared_per_vector", [16, 17])
def test_longer_rows_are_kept_as_far_as_the_card_has_room(plan, card, element_bytes, shared_per_vector):
    per_block = CARDS[card][2]
    for n in (1025, 8192, 32000, 50257, 131072, 1 << 20, 1 << 30):
        threads, elements, kept = plan(card, n, element_bytes, shared_per_vector)
        vectors = n * element_bytes // 16
        assert elements == 0
        assert threads in (128, 512, 1024)
        assert 0 < kept <= vectors
        assert kept * shared_per_vector + 5 * KIB <= per_block  # 5 KiB: reductions and the system
        assert kept == vectors or (kept + 1) * shared_per_vector + 6 * KIB > per_block


def test_known_rows(plan):
    assert plan("H100", 8192, 2) == (128, 0, 1024)  # all of it, in eight blocks of a multiprocessor
    assert plan("H100", 50257, 2) == (1024, 0, 6282)
    assert plan("H100", 113152, 2) == (1024, 0, 14144)  # the longest that is kept whole, twice as many as in fp32
    assert plan("H100", 131072, 2) == (1024, 0, 14144)
    assert plan("T4", 50257, 2)[2] * 16 == 58 * KIB


def test_rows_too_long_to_count_in_int(plan):
    assert plan("B200", 1 << 35, 2) == (1, 0, 0)
