// Who works on a row of sparsemax on CUDA, and where the row stays meanwhile: a pure function of row and card. [plain]
#pragma once
#include "common/cuda/limits.h"

namespace tse {

struct SparsemaxPlan {
  int row_threads;  // 4 to 32: several rows a block, in registers; more: a block, the row in shared memory; 1: too long
  int elements;  // of a thread, in registers
  int kept;  // vectors of 16 bytes in shared memory; those behind are read again where they are needed
};

// `shared_per_vector`: bytes that a vector takes in shared memory, itself and what is noted about it.
inline SparsemaxPlan plan_sparsemax(const DeviceLimits& limits, int64_t n, int64_t element_bytes,
                                    int64_t shared_per_vector) {
  constexpr int kInRegisters[][2] = {{4, 16}, {8, 32}, {32, 16}, {32, 32}};
  for (const auto& [threads, elements] : kInRegisters)
    if (n <= threads * elements) return {threads, elements, 0};
  const int64_t vectors = n / (16 / element_bytes);
  if (vectors > INT32_MAX / 2) return {1, 0, 0};
  const int threads = vectors <= 1024 ? 128 : vectors <= 4096 ? 512 : 1024;
  return {threads, 0, static_cast<int>(kept_bytes(limits, vectors * shared_per_vector) / shared_per_vector)};
}

}  // namespace tse
