"""Why a goal is missed, as measured, by the level of the machine: AVX-512 (2026-11-24), AVX2 (2026-11-27)."""

REASONS = {
    "forward": {
        "avx2": "exp and sum of 8 logits take 1.8 to 2.2 ns from L1: 3.6 to 4.5 ms for 32.8 million logits on two "
        "cores, beside 5.0 to 5.7 of reading them: 1.17 to 1.35 × by run",
    },
    "half": {
        "avx512": "exp and sum of 16 logits take 1.7 ns from cache: 1.74 of the 1.95 ms for 32.8 million logits on two "
        "cores, which read the bytes in 1.0 to 1.8 ms within the run",
        "avx2": "exp and sum of 8 logits take 1.8 to 2.2 ns from L1: 3.6 to 4.5 of the 4.9 and 5.0 ms for 32.8 "
        "million logits on two cores, which read the bytes in 2.6",
    },
    "pages": {
        "avx512": "the gradient's memory is fresh: what the kernel takes to supply its pages moves by a factor of two "
        "between runs, while the copy writes to warm memory (with the warm allocator 1.15 to 1.22 × in fp32, 2.6 × in "
        "bf16)",
        "avx2": "the gradient's memory is fresh: with the warm allocator 1.6 and 1.7 × in fp32, 2.3 × in bf16 of "
        "32000 classes, 3.2 × of 128256, whose terms do not fit into L2: exp is taken twice, 11.7 of 14.9 "
        "ms",
    },
    "in place": {
        "avx512": "the copy itself takes 5.3 to 7.9 ms within the run",
        "avx2": "1.1 to 1.4 × by run: the copy itself takes 8.4 to 13.6 ms",
    },
    "half in place": {
        "avx2": "32-bit terms of 128256 classes do not fit into L2, as those of up to 32768 do (1.8 ×): exp is taken "
        "twice, 2.2 and 3.5 ns for 8 logits from L1, 11.7 of the 14.5 ms on two cores",
    },
    "accumulation": {
        "avx512": "the same calls: what differs is the supply of fresh pages (with the warm allocator 0.97 to 1.1 ×)",
        "avx2": "the same calls, 0.86 to 1.13 × within the run: what differs is the supply of fresh pages",
    },
    "engine": {
        "avx512": "about 20 µs are torch's autograd engine, which eager pays, too",
        "avx2": "x.sum().backward() of these 80 numbers takes 75 of the 90 µs: torch's autograd engine, which "
        "eager pays, too",
    },
    "medium": {
        "avx512": "about 20 of 70 µs at 256×1000 are torch's autograd engine; the larger ones write 16 and 44 MB of "
        "fresh memory, whose pages cost between a quarter and two thirds of the time (4096×1000: 0.8 to 2.7 ms, warm "
        "0.6; segmentation 8 to 17 ms, warm 5.6, of which 2.0 are the copy and 2.4 the exponentials of forward)",
        "avx2": "x.sum().backward() of 80 numbers takes 75 of the 200 to 240 µs at 256×1000: torch's autograd "
        "engine; 4096×1000 writes 16 MB of fresh memory, 7.2 ms, with the warm allocator 2.1, 4.0 × "
        "faster than eager",
    },
    "one row": {
        "avx512": "back to back 17.1 against 11.2 µs, 1.5 ×: waking the second thread costs 2 to 3 µs beside 8.5, and "
        "more where it slept",
        "avx2": "back to back 44 to 47 against 29 to 30 µs, 1.5 ×: 8 µs are the call itself (8×10), and waking "
        "the second thread costs 3 to 4",
    },
    "shared cache": {
        "avx512": "rows come from and go to the cache that the cores of the machine share: at n = 8192 1.9 to 2.1 × "
        "the copy by run (one thread alone 1.4 to 1.9 ×), at n = 512 320 cycles a row, 153 for its copy",
        "avx2": "rows come from and go to the cache that the machine's cores, and its other tenants, share. The "
        "rows alone, two threads: 75 to 83 µs at n = 512, 370 cycles each on one core; 313 to 366 µs at "
        "8192, 360 to 387 at 131072: 1.5 to 1.8 × the copy of the run, in which they took 480 and 510",
    },
    "short rows": {
        "avx512": "92 cycles a row, 23 for its copy from cache: 38 additions (three of Newton's passes over the "
        "numbers of 16 rows at once), 23 comparisons and maxima, 16 permutations and 12 stores of 512 bits each, of "
        "which the core starts one of a kind a cycle, and a store every other (measured)",
        "avx2": "117 to 132 cycles a row, 8 rows at once: three of Newton's passes over 64 vectors of 5 "
        "operations each, about 190 shuffles and 260 operations to write: 180 operations a row, 1.4 a "
        "cycle, as each step waits for the one before; two groups of rows at once were 20 % slower, as 16 "
        "registers do not hold them",
    },
    "steps": {
        "avx512": "hundreds of elements are in the support instead of 4 or 5. Measured before flat rows began from a "
        "sample, and long ones from the maxima of their parts",
        "avx2": "158 elements are in the support instead of 4: 2.7 of Newton's passes over 64 vectors of 5 "
        "operations each, 108 cycles a pass, and 90 to solve the sample that they begin with, beside 370 "
        "for the rest of the row",
    },
    "short backward": {
        "avx512": "tensors of 1 to 2 MB stay in cache and torch's autograd engine takes about 20 of 65 to 75 µs",
        "avx2": "the rows alone, two threads, take 80 µs at n = 64, 75 at 512, 300 at 8192, 250 at 131072: 3.1, "
        "1.3, 0.7 and 1.0 × the sum of the run. The rest is torch's autograd engine, 75 µs a call, and "
        "the fresh pages of gradients of 8 MB",
    },
}
