"""Bugs to plant into the CUDA kernels, one at a time. The program of kernels_main.cpp must find each, alone ("plain")
or under a sanitizer."""

REDUCE = "common/cuda/reduce.cuh"
SPARSEMAX_FWD, SPARSEMAX_BWD = "sparsemax/sparsemax_fwd.cu", "sparsemax/sparsemax_bwd.cu"
STATE = "common/cuda/stream_state.cuh"
PLANTS = {
    # name: ((file, pattern, replacement), (mode of the program that must find it, words that its report must have))
    "no-barrier-after-write": (
        (REDUCE, r"^    __syncthreads\(\);\n(    v = partial)", r"\1"),
        ("tsan", "data race"),
    ),
    "no-barrier-before-reuse": (
        (REDUCE, r"^    __syncthreads\(\);  // the next.*$", ""),
        ("tsan", "data race"),
    ),
    "barrier-in-one-warp": (
        (REDUCE, r"^(    v = partial.*)$", r"if (threadIdx.x < 32) __syncthreads();\n\1"),
        ("plain", "divergent barrier"),
    ),
    "read-past-the-row": (
        ("common/cuda/vec.cuh", r"if \(tail \+ lane < n\) scalar", "if (tail + lane <= n) scalar"),
        ("asan", "heap-buffer-overflow"),
    ),
    "unaligned-load": (
        ("common/cuda/vec.cuh", r"const int64_t head = unaligned_head\(x, n\),", "const int64_t head = 0,"),
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
        ("cross_entropy/cross_entropy_fwd.cu", r"^.*__syncwarp\(\);.*$", ""),
        ("tsan", "data race"),
    ),
    "one-vector-too-many-is-kept": (
        ("common/cuda/kept_row.cuh", r"if \(v < kept_vectors_\) kept_", "if (v <= kept_vectors_) kept_"),
        ("asan", "heap-buffer-overflow"),
    ),
    "what-was-not-kept-is-taken-from-shared-memory": (
        (
            "common/cuda/kept_row.cuh",
            r"return v < kept_vectors_ \? kept_",
            "return v < kept_vectors_ + (kept_vectors_ > 0) ? kept_",
        ),
        ("plain", "known gradient"),
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
        ("common/cuda/compensated.cuh", r"^    rest \+= v - \(s - sum\);$", ""),
        ("plain", "gradient|loss"),
    ),
    "shared-memory-too-small": (
        (SPARSEMAX_FWD, r"kept \* sizeof\(Vec<T>\),", "(kept - 1) * sizeof(Vec<T>),"),
        ("asan", "heap-buffer-overflow"),
    ),
    "no-shared-memory-for-the-supports": (
        (SPARSEMAX_BWD, r"kept \* kKeptBytes<T>,", "kept * sizeof(Vec<T>),"),
        ("asan", "heap-buffer-overflow"),
    ),
    "a-bound-that-kills-the-living": (
        (SPARSEMAX_FWD, r"add_down\(max, A\(-1\)\)", "add_down(max, A(-0.5))"),
        ("plain", r"probability\["),
    ),
    "elements-before-the-vectors-forgotten": (
        (SPARSEMAX_FWD, r"^      add\(loose\);$", ""),
        ("plain", r"probability\["),
    ),
    "nan-kept-from-the-dead": (
        (SPARSEMAX_FWD, r"tau\.t != tau\.t \? tau\.t : A\(0\)", "A(0)"),
        ("plain", r"probability\["),
    ),
    "dead-vectors-of-a-living-group-not-kept": (
        (SPARSEMAX_FWD, r"v < kept && \(above \|\| live\.shift != 0\)", "v < kept && above"),
        ("plain", r"probability\["),
    ),
    "rows-of-a-warp-part": (
        (SPARSEMAX_FWD, r"if \(!any_goes_on\) return;", "if (!goes_on) return;"),
        ("plain", "deadlock|waits for a lane|stand at"),
    ),
    "no-barrier-after-the-step": (
        (SPARSEMAX_FWD, r"(search\[0\]\.step\(s\);\n)      __syncthreads\(\);", r"\1"),
        ("tsan", "data race"),
    ),
    "gradient-of-a-vector-after-those-kept": (
        (
            SPARSEMAX_BWD,
            r"gradient\(v < kept \? kept_g\[v\] : .*?, support",
            "gradient(kept_g[v < kept ? v : 0], support",
        ),
        ("plain", "sparsemax gradient"),
    ),
    "past-the-loose-elements": (
        ("sparsemax/row_parts.cuh", r"return i < n \? i : -1;", "return i <= n ? i : -1;"),
        ("asan", "heap-buffer-overflow"),
    ),
    "no-barrier-before-the-asked-classes": (
        ("selective_log_softmax/selective_log_softmax_bwd.cu", r"^    row_barrier<kRowThreads>\(\);$", ""),
        ("tsan", "data race"),
    ),
    "lanes-missing-from-a-shuffle": (
        (REDUCE, r"^  v = warp_reduce\(v, op\);$", "  if (threadIdx.x % 32 < 20) v = warp_reduce(v, op);"),
        ("plain", "deadlock|waits for a lane|stand at"),
    ),
}
