"""Every instruction-set level runs, gives right values and reads nothing after the logits: each in its own process."""

import sys

import pytest
from cpu_isa import BEST, IS_CHOSEN_OUTSIDE, LEVELS, check_at_the_end_of_a_page, levels, run, skip_if_missing

pytestmark = pytest.mark.skipif(IS_CHOSEN_OUTSIDE, reason="the level is chosen from outside")


def level_of(wish):
    code = "import torch, torch_softmax_ext; print(torch.ops.torch_softmax_ext._cpu_isa())"
    return run(wish, "-c", code).stdout.strip()


@pytest.mark.full
@levels
def test_values(level):
    skip_if_missing(level)
    out = run(level, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short", "tests", "-m", "values")
    assert out.returncode == 0, out.stdout[-4000:]


def test_the_level_can_be_chosen_up_to_the_best():
    for level in LEVELS[: BEST + 1]:
        assert level_of(level) == level
    assert level_of("avx512") == LEVELS[BEST]
    assert level_of("something else") == LEVELS[BEST]


ROWS_AND_COLUMNS = """
for spec in SPECS:
    args = spec.bench_args(x)
    for options in ({}, spec.general_options):
        want = spec.op(x, *args, **options)
        for columns in (False, True):
            y = end_of_page.copy(x.t().contiguous() if columns else x)
            got = spec.op(y.t() if columns else y, *args, **options)
            same = torch.equal(got, want) if spec.batch_invariant else torch.allclose(got, want, rtol=1e-2, atol=1e-2)
            assert same, (spec.name, options, columns, dtype, n)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="asks for mprotect")
@levels
def test_nothing_after_the_logits_is_read(level):
    check_at_the_end_of_a_page(level, ROWS_AND_COLUMNS)
