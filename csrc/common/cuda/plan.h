// What a GPU has, and how a row is worked on: pure functions of row and card, tested for cards that are not there.
// [plain]
#pragma once
#include <algorithm>
#include <cstdint>

namespace tse {

struct DeviceLimits {
  int multiprocessors;
  int threads_per_multiprocessor;
  int64_t shared_per_block;  // static and dynamic, of a kernel that asks for more than 48 KiB
  int64_t shared_per_multiprocessor;
};

// Of a block's shared memory, what is not for rows: the reductions' arrays, and 1 KiB of the system's from sm_80 on.
constexpr int64_t kSharedReserve = 6 * 1024;
// Threads of a multiprocessor that kernels leave registers for (64 each): every card has so many, and with four 16-byte
// loads of each under way memory is busy.
constexpr int kResidentThreads = 1024;
constexpr int64_t kBlocksPerMultiprocessor = 16;  // what every architecture has

// Blocks of a multiprocessor that threads and shared memory leave room for; registers may leave less.
inline int64_t resident_blocks(const DeviceLimits& limits, int threads, int64_t shared_bytes) {
  const int64_t by_threads = limits.threads_per_multiprocessor / threads;
  const int64_t by_shared = limits.shared_per_multiprocessor / (shared_bytes + kSharedReserve);
  return std::max<int64_t>(1, std::min({by_threads, by_shared, kBlocksPerMultiprocessor}));
}

// Shared memory for rows in a block, of which a multiprocessor shall hold so many.
inline int64_t shared_for_rows(const DeviceLimits& limits, int64_t blocks) {
  const int64_t of_block = std::min(limits.shared_per_block, limits.shared_per_multiprocessor / blocks);
  return std::max<int64_t>(0, of_block - kSharedReserve);
}

// Of a row that a block reads twice, the bytes that it keeps in shared memory in between: as much as it may have.
inline int64_t kept_bytes(const DeviceLimits& limits, int64_t row_bytes) {
  return std::min(row_bytes, shared_for_rows(limits, 1));
}

// threads: 1 (its elements are not contiguous, or too many to count in int), a part of a warp, a warp, or a block.
// vectors: of 16 bytes, in registers of each thread; 0: a row that is read twice is kept in shared memory.
struct RowPlan {
  int threads, vectors;
};

constexpr int64_t kLongestRow = int64_t(1) << 31;  // elements
constexpr RowPlan kInRegisters[] = {{4, 2}, {8, 4}, {32, 4}, {32, 16}, {128, 16}};

// Rows of one length have one plan on a card, so that their sums have the same bits in every call. `in_registers`:
// whether the kernel holds short rows there; `keeps`: whether it keeps longer ones in shared memory. One that fills
// more than half of that has a block of all threads; in float64, of which a thread's arithmetic takes twice as many
// registers, half of them.
inline RowPlan plan_row(const DeviceLimits& limits, int64_t n, int64_t element_bytes, bool contiguous,
                        bool in_registers, bool keeps) {
  if (!contiguous || n > kLongestRow) return {1, 0};
  for (const RowPlan& plan : kInRegisters)
    if (in_registers && element_bytes < 8 && n * element_bytes / 16 <= plan.threads * plan.vectors) return plan;
  if (n <= 1024) return {32, 0};
  if (n <= 8192) return {128, 0};
  const bool fills_half = keeps && n * element_bytes > shared_for_rows(limits, 2);
  return {fills_half && element_bytes < 8 ? 1024 : 512, 0};
}

// Vectors of each row that a block of `rows` keeps in shared memory, `bytes` each.
inline int kept_vectors(const DeviceLimits& limits, int64_t vectors, int rows, int64_t bytes = 16) {
  return static_cast<int>(kept_bytes(limits, rows * vectors * bytes) / rows / bytes);
}

}  // namespace tse
