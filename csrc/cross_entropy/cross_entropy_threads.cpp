// Cross-entropy on the CPU: rows, and blocks of rows, over torch's threads. [torch]
#include <vector>

#include "common/host.h"
#include "cross_entropy/cross_entropy.h"
#include "cross_entropy/cross_entropy_host.h"

namespace tse {

// Rows over threads; where rows are fewer than threads and wide, the blocks of each row over threads.
void run_rows(const CrossEntropyParams& p, bool forward, bool backward) {
  const int64_t rows = row_count(p.rows), blocks = (p.rows.n + kExpSumBlock - 1) / kExpSumBlock;
  const bool contiguous = p.rows.stride_n == 1 && (!backward || p.grad_rows.stride_n == 1);
  constexpr int64_t kBlocksPerTask = kElementsPerTask / kExpSumBlock;
  if (!contiguous || rows >= at::get_num_threads() || blocks < 2 * kBlocksPerTask || p.predictions != nullptr) {
    return parallel_rows(p.rows, [&](int64_t begin, int64_t end) {
      if (forward && backward) cross_entropy_fwd_bwd_rows(p, begin, end);
      else if (forward) cross_entropy_fwd_rows(p, begin, end);
      else cross_entropy_bwd_rows(p, begin, end);
    });
  }
  std::vector<BlockSum> sums(blocks);
  for (int64_t row = 0; row < rows; ++row) {
    if (forward) {
      at::parallel_for(0, blocks, kBlocksPerTask,
                       [&](int64_t begin, int64_t end) { cross_entropy_block_sums(p, row, begin, end, sums.data()); });
      cross_entropy_finish_row(p, row, sums.data());
    }
    if (backward) {
      at::parallel_for(0, blocks, kBlocksPerTask,
                       [&](int64_t begin, int64_t end) { cross_entropy_bwd_blocks(p, row, begin, end); });
    }
  }
}

}  // namespace tse
