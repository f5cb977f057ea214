"""What was measured of a goal that is missed, by machine: AMD with AVX-512 (2026-11-24, the kernels of that day), Intel
with AVX-512 (2026-11-27: 16 cores of a Xeon, two of them used), AMD with AVX2 (2026-11-27).

What was measured again on the Xeon is in results/cpu-xeon-again.md.
A reason that says that something was not found or not measured is none: there the goal is open.
"""

REASONS = {
    "forward": {
        "AMD avx2": "exp and sum of 8 logits take 1.8 to 2.2 ns from L1: 3.6 to 4.5 ms for 32.8 million logits on "
        "two cores, beside 5.0 to 5.7 of reading them: 1.17 to 1.35 × by run",
    },
    "half": {
        "AMD avx512": "exp and sum of 16 logits take 1.7 ns from cache: 1.74 of the 1.95 ms for 32.8 million logits "
        "on two cores, which read the bytes in 1.0 to 1.8 ms within the run",
        "Intel avx512": "exp and sum of 64 logits are 42 operations for the two ports of 512 bits, 21 to 22 cycles "
        "by llvm-mca; from L1 15 ticks of the time stamp counter, whose frequency was not read. The "
        "rows again, five times each, with either allocator: 1.7 to 3.1 ×. What else the slower ones "
        "spend was not found",
        "AMD avx2": "exp and sum of 8 logits take 1.8 to 2.2 ns from L1: 3.6 to 4.5 of the 4.9 and 5.0 ms for 32.8 "
        "million logits on two cores, which read the bytes in 2.6",
    },
    "pages": {
        "AMD avx512": "the gradient's memory is fresh: what the kernel takes to supply its pages moves by a factor "
        "of two between runs, while the copy writes to warm memory (with the warm allocator 1.15 to "
        "1.22 × in fp32, 2.6 × in bf16)",
        "AMD avx2": "with the warm allocator 1.5 to 1.7 × in fp32, 2.0 to 2.3 × in bf16 of 32000 classes, 2.8 to 3.2 "
        "× of 128256: the rest is the supply of fresh pages",
    },
    "in place": {
        "AMD avx512": "the copy itself takes 5.3 to 7.9 ms within the run",
        "AMD avx2": "1.14 to 1.41 × by run; the copy itself took 8.4 to 13.6 ms. Not taken further apart",
    },
    "half in place": {
        "AMD avx2": "measured before terms of rows of up to 262144 classes were kept; since then 7.9 to 10.5 ms "
        "where 13.3 to 18.4 were taken (256×128256, alternating processes)",
    },
    "accumulation": {
        "AMD avx512": "the same calls: what differs is the supply of fresh pages (with the warm allocator 0.97 to "
        "1.1 ×)",
        "Intel avx512": "the same calls; the row again, three times: 0.90, 1.01 and 0.88 ×, with the warm allocator "
        "1.05 and 0.85 ×",
        "AMD avx2": "the same calls, in rows measured one after the other: 0.86 to 1.13 × in one run, 1.02 to 1.07 "
        "and once 1.61 × in the next; that row again, twice: 1.00 and 1.07 ×, while plain backward "
        "itself moved from 22.4 to 13.1 ms",
    },
    "engine": {
        "AMD avx512": "about 20 µs are torch's autograd engine, which eager pays, too",
        "AMD avx2": "x.sum().backward() of these 80 numbers takes 79 µs, this call 87: nearly all is torch's "
        "autograd engine, which eager pays, too",
    },
    "medium": {
        "AMD avx512": "about 20 of 70 µs at 256×1000 are torch's autograd engine; the larger ones write 16 and 44 MB "
        "of fresh memory, whose pages cost between a quarter and two thirds of the time (4096×1000: "
        "0.8 to 2.7 ms, warm 0.6; segmentation 8 to 17 ms, warm 5.6, of which 2.0 are the copy and 2.4 "
        "the exponentials of forward)",
        "Intel avx512": "256×1000: torch's autograd engine takes 21 to 23 µs (x.sum().backward() of 80 numbers); the "
        "row again, five times, without its peers and with either allocator: 71 to 94 µs where the "
        "table's took 140; what made the difference was not found. Segmentation, without its peers: "
        "again 10.7 to 13.9 ms, with the warm allocator 7.1 and 7.5: fresh memory is the rest",
        "AMD avx2": "x.sum().backward() of 80 numbers takes 79 of the 200 to 240 µs at 256×1000: torch's autograd "
        "engine; 4096×1000 takes 7.2 ms, with the warm allocator 2.2, 3.6 × faster: the rest is the "
        "supply of fresh pages",
    },
    "one row": {
        "AMD avx512": "back to back 17.1 against 11.2 µs, 1.5 ×: waking the second thread costs 2 to 3 µs beside "
        "8.5, and more where it slept",
        "Intel avx512": "16.0 to 17.3 against 18.6 to 19.4 µs in three more runs; the call itself takes 5.7 to 7.1 "
        "of them (8×10): halving the rest would leave 12 to 13, 1.5 ×, so that 3 to 5 µs go to the "
        "second thread",
        "AMD avx2": "back to back 44 to 47 against 29 to 30 µs, 1.5 ×, of which 8 µs are the call itself (8×10); "
        "halving the rest would leave 26 to 28, so that 2 to 4 µs go to the second thread",
    },
    "shared cache": {
        "AMD avx512": "rows come from and go to the cache that the cores of the machine share: at n = 8192 1.9 to "
        "2.1 × the copy by run (one thread alone 1.4 to 1.9 ×), at n = 512 320 cycles a row, 153 for "
        "its copy",
        "AMD avx2": "the rows alone, two threads, at another minute: 72 to 83 µs at n = 512, twice the run's copy; "
        "313 to 366 at 8192 and 360 to 387 at 131072, 1.5 to 1.8 × the run's copy, where the run took "
        "480 and 510. What made the difference was not found; the run with the warm allocator has 1.92 "
        "and 1.59 ×",
    },
    "short rows": {
        "AMD avx512": "92 cycles a row, 23 for its copy from cache: 38 additions (three of Newton's passes over the "
        "numbers of 16 rows at once), 23 comparisons and maxima, 16 permutations and 12 stores of 512 "
        "bits each, of which the core starts one of a kind a cycle, and a store every other (measured)",
        "Intel avx512": "76 ticks of the time stamp counter for a row, from L2: writing it 25, as long as copying it "
        "(24), transposing 14, the threshold, with three of Newton's passes over 16 rows at once, "
        "30; the thresholds are since taken for all rows at once (with AVX2 165 → 135 cycles a row), "
        "which was not measured at this level. That is 3.2 × the copy; why the run has more was not "
        "found",
        "AMD avx2": "135 cycles a row, 165 when this table was measured: Newton's steps and transposing 95 to 102, "
        "writing 29, as long as copying",
    },
    "steps": {
        "AMD avx512": "hundreds of elements are in the support instead of 4 or 5. Measured before flat rows began "
        "from a sample, and long ones from the maxima of their parts: not measured since at this level",
        "Intel avx512": "a row of 512 from L1: 256 ticks of the time stamp counter at σ = 1, 532 where 155 elements "
        "are in the support: 2.75 of Newton's passes, 84 each, and a sample of the row, 63, are the "
        "difference; from L2 412 and 698, 1.7 ×. The rows again, three times: 2.3, 2.0 and 1.7 ×",
        "AMD avx2": "a row of 512 from L2: 490 cycles at σ = 1, 1240 where 157 elements are in the support: 2.7 of "
        "Newton's passes, 200 each, and a sample of the row, 167, are 710 of the 750",
    },
    "short backward": {
        "AMD avx512": "tensors of 1 to 2 MB stay in cache and torch's autograd engine takes about 20 of 65 to 75 µs",
        "Intel avx512": "torch's autograd engine takes 21 to 23 µs (x.sum().backward() of 80 numbers), where 1.5 × "
        "the sum would be 37 to 46 µs at n = 64 and the rows alone, 55 to 61 ticks each from L2, two "
        "to three times their copy; the row took 61 to 88 µs in three more runs. At 512 the row "
        "again: 0.8, 1.5 and 1.35 ×",
        "AMD avx2": "the rows alone, two threads, at another minute: 80 µs at n = 64, 75 at 512, 300 at 8192, 250 at "
        "131072, 3.1, 1.3, 0.7 and 1.0 × the run's sum; torch's autograd engine takes 79 a call "
        "(x.sum().backward()). With the warm allocator 2.0, 1.5 and 1.1 × at 8192, 32000 and 131072: "
        "fresh pages are a part; what else 8192 spends was not found",
    },
}
