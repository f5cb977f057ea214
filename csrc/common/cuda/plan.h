// How a row is worked on: a pure function of the row and the card, tested for cards that are not there. [plain]
#pragma once
#include "common/cuda/limits.h"

namespace tse {

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
