"""What is known of a goal that is missed beside what the run itself measured: operations and what the core starts of
them, and other runs. By machine: AMD with AVX-512 (2026-11-24, the kernels of that day), Intel with AVX-512
(2026-11-27: 16 cores of a Xeon, two of them used), AMD with AVX2 (2026-11-28); with a shape, of that shape alone.

What was measured again on the Xeon is in results/cpu-xeon-again.md.
A reason that says that something was not found or not measured is none: there the goal is open.
"""

REASONS = {
    "half": {
        "AMD avx512": "exp and sum of 16 logits take 1.7 ns from cache: 1.74 of the 1.95 ms for 32.8 million logits "
        "on two cores, which read the bytes in 1.0 to 1.8 ms within the run",
        "Intel avx512": "exp and sum of 64 logits are 42 operations for the two ports of 512 bits, 21 to 22 cycles "
        "by llvm-mca; from L1 15 ticks of the time stamp counter, whose frequency was not read. The "
        "rows again, five times each, with either allocator: 1.7 to 3.1 ×. What else the slower ones "
        "spend was not found",
        "AMD avx2": "exp and sum of 8 logits are 12.5 vector operations; of one kind the core starts 2 a cycle, of "
        "kinds mixed 2.2 to 2.8, at 3.1 GHz (all measured): 1.4 to 1.8 ns, where they take 1.75 from L1 in a good "
        "minute and 2.4 in others",
    },
    "pages": {
        "AMD avx512": "the gradient's memory is fresh: what the kernel takes to supply its pages moves by a factor "
        "of two between runs, while the copy writes to warm memory (with the warm allocator 1.15 to "
        "1.22 × in fp32, 2.6 × in bf16)",
    },
    "in place": {
        "AMD avx512": "the copy itself takes 5.3 to 7.9 ms within the run",
    },
    "accumulation": {
        "AMD avx512": "the same calls: what differs is the supply of fresh pages (with the warm allocator 0.97 to "
        "1.1 ×)",
        "Intel avx512": "the same calls; the row again, three times: 0.90, 1.01 and 0.88 ×, with the warm allocator "
        "1.05 and 0.85 ×",
        "AMD avx2": "the same calls, interleaved; the row again, three times with the warm allocator: 0.94, 1.13 and "
        "0.99 ×",
    },
    "engine": {
        "AMD avx512": "about 20 µs are torch's autograd engine, which eager pays, too",
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
    },
    "one row": {
        "AMD avx512": "back to back 17.1 against 11.2 µs, 1.5 ×: waking the second thread costs 2 to 3 µs beside "
        "8.5, and more where it slept",
        "Intel avx512": "16.0 to 17.3 against 18.6 to 19.4 µs in three more runs",
    },
    "shared cache": {
        "AMD avx512": "rows come from and go to the cache that the cores of the machine share: at n = 8192 1.9 to "
        "2.1 × the copy by run (one thread alone 1.4 to 1.9 ×), at n = 512 320 cycles a row, 153 for "
        "its copy",
        "AMD avx2 1024x512": "a row takes 310 cycles from L2 in a good minute, its copy 130: 96 to find the two "
        "largest of sixteen parts, 192 maxima and minima of which the core starts 2 a cycle (measured), 127 for "
        "writing, as long as the copy, 45 to 55 for the threshold. Looking through a row while another is written "
        "takes 200 instead of 96 + 127, but the whole only 0 to 3 % less",
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
        "AMD avx2": "a row takes 92 cycles from L2 in a good minute, 115 in others, its copy 16. Left out one by one: "
        "writing 21, transposition 7, sorting the largest of eight parts 4, Newton's passes but the first 35, "
        "1.8 of 40 operations; what is left, 25, is the first pass and reading",
    },
    "steps": {
        "AMD avx512": "hundreds of elements are in the support instead of 4 or 5. Measured before flat rows began "
        "from a sample, and long ones from the maxima of their parts: not measured since at this level",
        "Intel avx512": "a row of 512 from L1: 256 ticks of the time stamp counter at σ = 1, 532 where 155 elements "
        "are in the support: 2.75 of Newton's passes, 84 each, and a sample of the row, 63, are the "
        "difference; from L2 412 and 698, 1.7 ×. The rows again, three times: 2.3, 2.0 and 1.7 ×",
        "AMD avx2 1024x512": "from L2 490 cycles a row at σ = 1, 1240 where 157 elements are in the support: 2.7 "
        "of Newton's passes, 200 each, and a sample of the row, 167, are 710 of the 750",
    },
    "short backward": {
        "AMD avx512": "tensors of 1 to 2 MB stay in cache and torch's autograd engine takes about 20 of 65 to 75 µs",
        "Intel avx512": "torch's autograd engine takes 21 to 23 µs (x.sum().backward() of 80 numbers), where 1.5 × "
        "the sum would be 37 to 46 µs at n = 64 and the rows alone, 55 to 61 ticks each from L2, two "
        "to three times their copy; the row took 61 to 88 µs in three more runs. At 512 the row "
        "again: 0.8, 1.5 and 1.35 ×",
    },
}
