// What a GPU has, and what of it a row takes: pure functions, tested for cards that are not there. [plain]
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

}  // namespace tse
