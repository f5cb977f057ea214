"""Bugs to plant into the CUDA kernels, one at a time. The program of kernels_main.cpp must find each, alone ("plain")
or under a sanitizer."""

REDUCE = "common/cuda/reduce.cuh"
ROW = "common/cuda/row.cuh"
ENTMAX_FWD, THRESHOLD, ANY_ALPHA = "entmax/entmax_fwd.cuh", "entmax/threshold.cuh", "entmax/any_alpha.cuh"
MAP_ROWS, MAP_BWD = "common/cuda/map_rows.cuh", "common/cuda/row_map_bwd.cuh"
STATE = "common/cuda/stream_state.cuh"
PLANTS = {
    # name: ((file, pattern, replacement), (mode of the program that must find it, words that its report must have))
    "no-barrier-after-write": (
        (REDUCE, r"^  __syncthreads\(\);\n(  return of_warp\[)", r"\1"),
        ("tsan", "data race"),
    ),
    "no-barrier-before-reuse": (
        (REDUCE, r"^  turn = kWarps - turn;$", ""),
        ("tsan", "data race"),
    ),
    "barrier-in-one-warp": (
        (REDUCE, r"^(  return of_warp\[.*)$", r"if (threadIdx.x < 32) __syncthreads();\n\1"),
        ("plain", "divergent barrier"),
    ),
    "read-past-the-row": (
        (ROW, r"return i < n \? i : -1;", "return i <= n ? i : -1;"),
        ("asan", "heap-buffer-overflow"),
    ),
    "unaligned-load": (
        (ROW, r"head\(kRowThreads == 1 \? 0 : x\.head\(n\)\)", "head(0)"),
        ("plain", "misaligned 16-byte load"),
    ),
    "no-fence-before-the-ticket": (
        (STATE, r"^    __threadfence\(\);\n(    is_last)", r"\1"),
        ("tsan", "data race"),
    ),
    "no-fence-after-the-ticket": (
        (STATE, r"^(    is_last.*)\n    __threadfence\(\);", r"\1"),
        ("tsan", "data race"),
    ),
    "ticket-not-reset": (
        (STATE, r"atomicInc\(ticket, gridDim.x - 1\)", "atomicInc(ticket, ~0u)"),
        ("plain", "ticket|reduced"),
    ),
    "gradient-before-all-have-read-the-target": (
        ("cross_entropy/cross_entropy_fwd.cu", r"^.*row_barrier<kRowThreads>\(\);.*$", ""),
        ("tsan", "data race"),
    ),
    "one-vector-too-many-is-kept": (
        (ROW, r"if \(v < kept_vectors_\) kept_", "if (v <= kept_vectors_) kept_"),
        ("asan", "heap-buffer-overflow"),
    ),
    "the-second-walk-forgets-what-was-not-kept": (
        (ROW, r"^    walk_vectors<true>\(kept, this->vectors.*$", ""),
        ("plain", "known gradient|sparsemax gradient|rescaled"),
    ),
    "a-vector-of-the-second-walk-too-many": (
        (ROW, r"\? \(end - first - 1\) / kRowThreads \+ 1 : 0", "? (end - first - 1) / kRowThreads + 2 : 0"),
        ("asan", "heap-buffer-overflow"),
    ),
    "a-register-row-too-short": (
        ("common/cuda/plan.h", r"n \* element_bytes / 16 <= plan", "n * element_bytes / 17 <= plan"),
        ("plain", "gradient|loss|value"),
    ),
    "any-guess-is-right": (
        ("cross_entropy/cross_entropy_bwd.cu", r"== \*p.guess\) return", "== *p.guess || *p.guess == *p.guess) return"),
        ("plain", "gradient after a wrong guess"),
    ),
    "no-guess-is-right": (
        ("cross_entropy/cross_entropy_bwd.cu", r"== \*p.guess\) return", "!= *p.guess) {}"),
        ("plain", "a pass after a right guess"),
    ),
    "a-guess-from-one-backward": (
        ("cross_entropy/cross_entropy_bwd.cu", r"state->last\[which\] == grad;", "1;"),
        ("plain", "guess"),
    ),
    "the-divisor-counts-ignored-rows": (
        (
            "cross_entropy/cross_entropy_fwd.cu",
            r"!is_counted\(p, target\) \|\| p.rows.n == 0\) continue",
            "false) continue",
        ),
        ("plain", "known gradient"),
    ),
    "a-column-in-one-sum": (
        ("common/cuda/logits.cuh", r"^    rest \+= v - \(s - sum\);$", ""),
        ("plain", "gradient|loss"),
    ),
    "shared-memory-too-small": (
        (ROW, r"= size_t\(kept\) \* 16 \* kRows;", "= size_t(kept > 0 ? kept - 1 : 0) * 16 * kRows;"),
        ("asan", "heap-buffer-overflow"),
    ),
    "shared-memory-of-one-row-for-several": (
        (ROW, r"= size_t\(kept\) \* 16 \* kRows;", "= size_t(kept) * 16;"),
        ("asan", "heap-buffer-overflow"),
    ),
    "a-bound-that-kills-the-living": (
        (ENTMAX_FWD, r"add_down\(first_max, -policy\.reach\)", "add_down(first_max, A(-0.5))"),
        ("plain", r"value\["),
    ),
    "elements-before-the-vectors-forgotten": (
        (ENTMAX_FWD, r"^    add_term\(own, policy, tau\.above\(policy\.z\(loose_value, m\)\)\);$", ""),
        ("plain", r"value\["),
    ),
    "nan-kept-from-the-dead": (
        (ENTMAX_FWD, r"tau\.t != tau\.t \? tau\.t : A\(0\)", "A(0)"),
        ("plain", r"value\["),
    ),
    "dead-vectors-of-a-living-group-not-kept": (
        (ENTMAX_FWD, r"v < kept && \(is_alive \|\| live\.shift != 0\)", "v < kept && is_alive"),
        ("plain", r"value\["),
    ),
    "a-threshold-of-maxima-is-the-rows": (
        (
            ENTMAX_FWD,
            r"^      add_term\(own, policy, tau\.above\(z\)\);\n      if \(ends\)",
            "if (ends) add_term(own, policy, tau.above(z));\n      if (ends)",
        ),
        ("plain", r"value\["),
    ),
    "no-barrier-after-the-step": (
        (ENTMAX_FWD, r"(search\[0\]\.step\(s, policy\.scale\);\n        }\n)        __syncthreads\(\);", r"\1"),
        ("tsan", "data race"),
    ),
    "zeros-of-a-row-that-has-some": (
        (
            MAP_BWD,
            r"          if \(is_dead\(v\)\) return v;",
            "          if (is_dead(v) || i == 0) return v;",
        ),
        ("plain", "sparsemax gradient"),
    ),
    "a-slope-that-is-too-steep": (
        (THRESHOLD, r"static A slope\(A above\) { return above; }", "static A slope(A above) { return above * 16; }"),
        ("plain", r"entmax15 value\["),
    ),
    "a-range-of-sparsemax-for-all": (
        (ENTMAX_FWD, r"add_down\(first_max, -policy\.reach\)", "add_down(first_max, A(-1))"),
        ("plain", r"entmax15 value\["),
    ),
    "weights-p": (
        (THRESHOLD, r"static A weight\(A p\) { return fast_sqrt\(p\); }", "static A weight(A p) { return p; }"),
        ("plain", r"entmax15 gradient\["),
    ),
    "a-mask-forgotten": (
        (MAP_ROWS, r"if \(mask == nullptr\) return;", "return;"),
        ("plain", r"value\["),
    ),
    "a-temperature-forgotten": (
        (MAP_ROWS, r"return units\(row\)\.temperature;", "return 1;"),
        ("plain", r"value\["),
    ),
    "an-added-mask-in-another-unit": (
        (MAP_ROWS, r"A\(u\.of_mask\)", "A(1)"),
        ("plain", r"value\["),
    ),
    "a-pack-that-is-not-aligned": (
        (MAP_ROWS, r"% of_pack\) % of_pack / bytes;", "% of_pack) * 0;"),
        ("asan", "misaligned address"),
    ),
    "a-sum-with-another-reference": (
        ("softmax/softmax_fwd.cu", r"if \(s\.m\(\) < max\) s\.raise_reference\(max, logits\);", "s.set(max, A(0));"),
        ("plain", r"softmax value\["),
    ),
    "a-newton-step-of-another-alpha": (
        (ANY_ALPHA, r"return c \* \(f - 1\);", "return 4 * (f - 1);"),
        ("plain", r"entmax value\["),
    ),
    "an-alpha-below-1-searched-downwards": (
        (ANY_ALPHA, r"\(f > 1\) == \(alpha\.c > 0\)", "(f > 1)"),
        ("plain", r"entmax value\["),
    ),
    "the-most-probable-element-left-out": (
        (MAP_BWD, r"rest / \(total\.weight \+ total\.most\)", "rest / total.weight"),
        ("plain", r"gradient\["),
    ),
    "the-own-class-among-the-others": (
        ("entmax_loss/entmax_loss_fwd.cu", r"return i \+ k == target \? A\(0\) : of_p", "return of_p"),
        ("plain", r"entmax loss"),
    ),
    "a-loss-without-its-entropy": (
        ("entmax_loss/entmax_loss_fwd.cu", r"of_surprise \+= v \* w\(v\);", "of_surprise += 0;"),
        ("plain", r"entmax loss\["),
    ),
    "no-barrier-before-the-asked-classes": (
        ("selective_log_softmax/selective_log_softmax_bwd.cu", r"^    row_barrier<kRowThreads>\(\);.*$", ""),
        ("tsan", "data race"),
    ),
    "lanes-missing-from-a-shuffle": (
        (
            REDUCE,
            r"^  v = reduce\(v, std::integral_constant<int, kLanes>\(\)\);$",
            "  if (threadIdx.x % 32 < 20) v = reduce(v, std::integral_constant<int, kLanes>());",
        ),
        ("plain", "deadlock|waits for a lane|stand at"),
    ),
}
