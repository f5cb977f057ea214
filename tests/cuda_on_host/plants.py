"""Bugs to plant into the CUDA kernels, one at a time. The checks of an operator must find each, alone ("plain") or
under a sanitizer."""

from typing import NamedTuple


class Plant(NamedTuple):
    file: str  # below csrc
    pattern: str  # a regular expression that matches once
    replacement: str
    mode: str  # of the program that must find it
    words: str  # a regular expression: what the program must report
    operator: str  # whose checks are run


REDUCE = "common/cuda/reduce.cuh"
ROW = "common/cuda/row.cuh"
ENTMAX_FWD, THRESHOLD, ANY_ALPHA = "entmax/entmax_fwd.cuh", "entmax/threshold.cuh", "entmax/any_alpha.cuh"
MAP_ROWS, MAP_BWD = "common/cuda/map_rows.cuh", "common/cuda/row_map_bwd.cuh"
STATE = "common/cuda/stream_state.cuh"
PLANTS = {
    "no-barrier-after-write": Plant(
        REDUCE, r"^  __syncthreads\(\);\n(  return of_warp\[)", r"\1", "tsan", "data race", "softmax"
    ),
    "no-barrier-before-reuse": Plant(REDUCE, r"^  turn = kWarps - turn;$", "", "tsan", "data race", "sparsemax"),
    "barrier-in-one-warp": Plant(
        REDUCE,
        r"^(  return of_warp\[.*)$",
        r"if (threadIdx.x < 32) __syncthreads();\n\1",
        "plain",
        "divergent barrier",
        "softmax",
    ),
    "read-past-the-row": Plant(
        ROW,
        r"return i < n \? i : -1;",
        "return i <= n ? i : -1;",
        "asan",
        "heap-buffer-overflow",
        "selective_log_softmax",
    ),
    "unaligned-load": Plant(
        ROW, r"head\(kRowThreads == 1 \? 0 : x\.head\(n\)\)", "head(0)", "plain", "misaligned 16-byte load", "softmax"
    ),
    "no-fence-before-the-ticket": Plant(
        STATE, r"^    __threadfence\(\);\n(    is_last)", r"\1", "tsan", "data race", "cross_entropy"
    ),
    "no-fence-after-the-ticket": Plant(
        STATE, r"^(    is_last.*)\n    __threadfence\(\);", r"\1", "tsan", "data race", "cross_entropy"
    ),
    "ticket-not-reset": Plant(
        STATE,
        r"atomicInc\(ticket, gridDim.x - 1\)",
        "atomicInc(ticket, ~0u)",
        "plain",
        "ticket|reduced",
        "cross_entropy",
    ),
    "gradient-before-all-have-read-the-target": Plant(
        "cross_entropy/cross_entropy_fwd.cu",
        r"^.*row_barrier<kRowThreads>\(\);.*$",
        "",
        "tsan",
        "data race",
        "cross_entropy",
    ),
    "one-vector-too-many-is-kept": Plant(
        ROW,
        r"if \(v < kept_vectors_\) kept_",
        "if (v <= kept_vectors_) kept_",
        "asan",
        "heap-buffer-overflow",
        "sparsemax",
    ),
    "the-second-walk-forgets-what-was-not-kept": Plant(
        ROW,
        r"^    walk_vectors<true>\(kept, this->vectors.*$",
        "",
        "plain",
        "known gradient|sparsemax gradient|rescaled",
        "sparsemax",
    ),
    "a-vector-of-the-second-walk-too-many": Plant(
        ROW,
        r"\? \(end - first - 1\) / kRowThreads \+ 1 : 0",
        "? (end - first - 1) / kRowThreads + 2 : 0",
        "asan",
        "heap-buffer-overflow",
        "selective_log_softmax",
    ),
    "a-register-row-too-short": Plant(
        "common/cuda/plan.h",
        r"n \* element_bytes / 16 <= plan",
        "n * element_bytes / 17 <= plan",
        "plain",
        "gradient|loss|value",
        "softmax",
    ),
    "any-guess-is-right": Plant(
        "cross_entropy/cross_entropy_bwd.cu",
        r"== \*p.guess\) return",
        "== *p.guess || *p.guess == *p.guess) return",
        "plain",
        "gradient after a wrong guess",
        "cross_entropy",
    ),
    "no-guess-is-right": Plant(
        "cross_entropy/cross_entropy_bwd.cu",
        r"== \*p.guess\) return",
        "!= *p.guess) {}",
        "plain",
        "a pass after a right guess",
        "cross_entropy",
    ),
    "a-guess-from-one-backward": Plant(
        "cross_entropy/cross_entropy_bwd.cu", r"state->last\[which\] == grad;", "1;", "plain", "guess", "cross_entropy"
    ),
    "the-divisor-counts-ignored-rows": Plant(
        "cross_entropy/cross_entropy_fwd.cu",
        r"!is_counted\(p, target\) \|\| p.rows.n == 0\) continue",
        "false) continue",
        "plain",
        "known gradient",
        "cross_entropy",
    ),
    "a-column-in-one-sum": Plant(
        "common/cuda/logits.cuh", r"^    rest \+= v - \(s - sum\);$", "", "plain", "gradient|loss", "cross_entropy"
    ),
    "shared-memory-too-small": Plant(
        ROW,
        r"= size_t\(kept\) \* 16 \* kRows;",
        "= size_t(kept > 0 ? kept - 1 : 0) * 16 * kRows;",
        "asan",
        "heap-buffer-overflow",
        "sparsemax",
    ),
    "shared-memory-of-one-row-for-several": Plant(
        ROW,
        r"= size_t\(kept\) \* 16 \* kRows;",
        "= size_t(kept) * 16;",
        "asan",
        "heap-buffer-overflow",
        "sparsemax",
    ),
    "a-bound-that-kills-the-living": Plant(
        ENTMAX_FWD,
        r"add_down\(first_max, -policy\.reach\)",
        "add_down(first_max, A(-0.5))",
        "plain",
        r"value\[",
        "sparsemax",
    ),
    "elements-before-the-vectors-forgotten": Plant(
        ENTMAX_FWD,
        r"^    add_term\(own, policy, tau\.above\(policy\.z\(loose_value, m\)\)\);$",
        "",
        "plain",
        r"value\[",
        "sparsemax",
    ),
    "nan-kept-from-the-dead": Plant(
        ENTMAX_FWD, r"tau\.t != tau\.t \? tau\.t : A\(0\)", "A(0)", "plain", r"value\[", "sparsemax"
    ),
    "dead-vectors-of-a-living-group-not-kept": Plant(
        ENTMAX_FWD,
        r"v < kept && \(is_alive \|\| live\.shift != 0\)",
        "v < kept && is_alive",
        "plain",
        r"value\[",
        "sparsemax",
    ),
    "a-threshold-of-maxima-is-the-rows": Plant(
        ENTMAX_FWD,
        r"^      add_term\(own, policy, tau\.above\(z\)\);\n      if \(ends\)",
        "if (ends) add_term(own, policy, tau.above(z));\n      if (ends)",
        "plain",
        r"value\[",
        "sparsemax",
    ),
    "no-barrier-after-the-step": Plant(
        ENTMAX_FWD,
        r"(search\[0\]\.step\(s, policy\.scale\);\n        }\n)        __syncthreads\(\);",
        r"\1",
        "tsan",
        "data race",
        "sparsemax",
    ),
    "zeros-of-a-row-that-has-some": Plant(
        MAP_BWD,
        r"          if \(is_dead\(v\)\) return v;",
        "          if (is_dead(v) || i == 0) return v;",
        "plain",
        "sparsemax gradient",
        "sparsemax",
    ),
    "a-slope-that-is-too-steep": Plant(
        THRESHOLD,
        r"static A slope\(A above\) { return above; }",
        "static A slope(A above) { return above * 16; }",
        "plain",
        r"entmax15 value\[",
        "entmax",
    ),
    "a-range-of-sparsemax-for-all": Plant(
        ENTMAX_FWD,
        r"add_down\(first_max, -policy\.reach\)",
        "add_down(first_max, A(-1))",
        "plain",
        r"entmax15 value\[",
        "entmax",
    ),
    "weights-p": Plant(
        THRESHOLD,
        r"static A weight\(A p\) { return fast_sqrt\(p\); }",
        "static A weight(A p) { return p; }",
        "plain",
        r"entmax15 gradient\[",
        "entmax",
    ),
    "a-mask-forgotten": Plant(MAP_ROWS, r"if \(mask == nullptr\) return;", "return;", "plain", r"value\[", "softmax"),
    "a-temperature-forgotten": Plant(
        MAP_ROWS, r"return units\(row\)\.temperature;", "return 1;", "plain", r"value\[", "softmax"
    ),
    "an-added-mask-in-another-unit": Plant(MAP_ROWS, r"A\(u\.of_mask\)", "A(1)", "plain", r"value\[", "softmax"),
    "a-pack-that-is-not-aligned": Plant(
        MAP_ROWS, r"% of_pack\) % of_pack / bytes;", "% of_pack) * 0;", "asan", "misaligned address", "sparsemax"
    ),
    "a-sum-with-another-reference": Plant(
        "softmax/softmax_fwd.cu",
        r"if \(s\.m\(\) < max\) s\.raise_reference\(max, logits\);",
        "s.set(max, A(0));",
        "plain",
        r"softmax value\[",
        "softmax",
    ),
    "a-newton-step-of-another-alpha": Plant(
        ANY_ALPHA, r"return c \* \(f - 1\);", "return 4 * (f - 1);", "plain", r"entmax value\[", "entmax"
    ),
    "an-alpha-below-1-searched-downwards": Plant(
        ANY_ALPHA, r"\(f > 1\) == \(alpha\.c > 0\)", "(f > 1)", "plain", r"entmax value\[", "entmax"
    ),
    "the-most-probable-element-left-out": Plant(
        MAP_BWD, r"rest / \(total\.weight \+ total\.most\)", "rest / total.weight", "plain", r"gradient\[", "softmax"
    ),
    "the-own-class-among-the-others": Plant(
        "entmax_loss/entmax_loss_kernels.cu",
        r"i == target \? A\(0\) : probability\(v\)",
        "probability(v)",
        "plain",
        r"entmax loss",
        "entmax_loss",
    ),
    "a-loss-without-its-entropy": Plant(
        "entmax_loss/entmax_loss_kernels.cu",
        r"\(level \* mass - linear\) / alpha",
        "0",
        "plain",
        r"entmax loss\[",
        "entmax_loss",
    ),
    "no-barrier-before-the-asked-classes": Plant(
        "selective_log_softmax/selective_log_softmax_bwd.cu",
        r"^    row_barrier<kRowThreads>\(\);.*$",
        "",
        "tsan",
        "data race",
        "selective_log_softmax",
    ),
    "lanes-missing-from-a-shuffle": Plant(
        REDUCE,
        r"^  v = reduce\(v, std::integral_constant<int, kLanes>\(\)\);$",
        "  if (threadIdx.x % 32 < 20) v = reduce(v, std::integral_constant<int, kLanes>());",
        "plain",
        "deadlock|waits for a lane|stand at",
        "softmax",
    ),
}
