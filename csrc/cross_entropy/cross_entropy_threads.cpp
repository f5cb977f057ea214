// Cross-entropy on the CPU, all rows: what is done once for a call, and rows and blocks over torch's threads. [torch]
#include <algorithm>
#include <atomic>
#include <numeric>
#include <vector>

#include "common/host.h"
#include "cross_entropy/cross_entropy.h"
#include "cross_entropy/cross_entropy_host.h"

namespace tse {
namespace {

// Σ f(begin, end) over chunks of the rows, which run in parallel and are added in order: the same bits for any threads.
template <class F>
double sum_by_chunks(int64_t rows, const F& f) {
  constexpr int64_t kChunk = 8192;
  if (rows <= kChunk) return f(0, rows);
  std::vector<double> chunks((rows + kChunk - 1) / kChunk);
  at::parallel_for(0, int64_t(chunks.size()), 2, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) chunks[c] = f(c * kChunk, std::min((c + 1) * kChunk, rows));
  });
  return std::accumulate(chunks.begin(), chunks.end(), 0.0);
}

// Counts the targets that are not ignored. A target that is no class raises before anything is written.
template <class Index>
double count_targets(const Index* target, int64_t rows, int64_t classes, int64_t ignore_index) {
  std::atomic<bool> bad = false;
  const double counted = sum_by_chunks(rows, [&](int64_t begin, int64_t end) {
    int64_t count = 0, outside = 0;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t is_counted = target[i] != ignore_index;
      count += is_counted;
      outside += is_counted & int64_t(uint64_t(target[i]) >= uint64_t(classes));
    }
    if (outside != 0) bad = true;
    return double(count);
  });
  if (bad) {
    const Index* t =
        std::find_if(target, target + rows, [&](int64_t v) { return v != ignore_index && (v < 0 || v >= classes); });
    TSE_CHECK_INDEX(false, "cross_entropy", "target", "expected a class index in [0, ", classes, ") or ignore_index ",
                    ignore_index, ", got ", int64_t(*t), " at row ", t - target);
  }
  return counted;
}

// Fills in p.total_weight.
template <class A>
void count_targets(const CrossEntropyParams& p) {
  const int64_t rows = row_count(p.rows), n = p.rows.n;
  double counted =
      n == 0 ? 0 : double(rows);  // class probabilities all count, and alike; of no classes the mean is NaN
  if (p.target != nullptr) {
    counted = p.target_is_int32 ? count_targets(static_cast<const int32_t*>(p.target), rows, n, p.ignore_index)
                                : count_targets(static_cast<const int64_t*>(p.target), rows, n, p.ignore_index);
  }
  p.total_weight[0] = p.total_weight[1] = counted;
  if (p.target == nullptr || p.weight == nullptr) return;
  const A* weight = static_cast<const A*>(p.weight);
  p.total_weight[0] = sum_by_chunks(rows, [&](int64_t begin, int64_t end) {
    double sum = 0;
    for (int64_t row = begin; row < end; ++row) {
      const int64_t target = target_of(p, row);
      if (target != p.ignore_index) sum += double(weight[target]);
    }
    return sum;
  });
}

// Σ row_loss and the z-loss, divided for the mean. Four sums: one would wait for each addition.
template <class A>
void reduce_loss(const CrossEntropyParams& p) {
  const A* row_loss = static_cast<const A*>(p.row_loss);
  const bool mean = p.reduction == Reduction::kMean;
  double sum = sum_by_chunks(row_count(p.rows), [&](int64_t begin, int64_t end) {
    double a = 0, b = 0, c = 0, d = 0;
    int64_t i = begin;
    for (; i + 4 <= end; i += 4) {
      a += double(row_loss[i]);
      b += double(row_loss[i + 1]);
      c += double(row_loss[i + 2]);
      d += double(row_loss[i + 3]);
    }
    for (; i < end; ++i) a += double(row_loss[i]);
    return (a + b) + (c + d);
  });
  if (mean) sum /= p.total_weight[0];  // 0 / 0 is NaN
  double z_loss = 0;
  if (p.z_loss_weight != 0) {
    const A *m = static_cast<const A*>(p.row_m), *s = static_cast<const A*>(p.row_sum);
    z_loss = p.z_loss_weight * sum_by_chunks(row_count(p.rows), [&](int64_t begin, int64_t end) {
               double squares = 0;
               for (int64_t row = begin; row < end; ++row) {
                 if (!is_counted(p, target_of(p, row))) continue;
                 const double lse = lse_of(p.transform, m[row], s[row]);
                 squares += lse * lse;
               }
               return squares;
             });
    if (mean) z_loss /= p.total_weight[1];
  }
  *static_cast<A*>(p.loss) = A(sum + z_loss);
  if (p.z_loss != nullptr) *static_cast<A*>(p.z_loss) = A(z_loss);
}

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

template <class A>
void run_fwd(const CrossEntropyParams& p, bool with_gradient) {
  count_targets<A>(p);
  run_rows(p, /*forward=*/true, /*backward=*/with_gradient);
  if (p.loss != nullptr) reduce_loss<A>(p);
}

}  // namespace

void check_target_range(const at::Tensor& input, const at::Tensor& target, int64_t ignore_index) {
  if (target.is_floating_point()) return;
  const at::Tensor t = class_indices(target).contiguous();
  const int64_t classes = input.size(input.dim() == 1 ? 0 : 1);
  if (t.scalar_type() == at::kInt) count_targets(t.const_data_ptr<int32_t>(), t.numel(), classes, ignore_index);
  else count_targets(t.const_data_ptr<int64_t>(), t.numel(), classes, ignore_index);
}

void run_cross_entropy_fwd(const CrossEntropyParams& p, bool with_gradient) {
  if (p.dtype == DType::kFloat64) run_fwd<double>(p, with_gradient);
  else run_fwd<float>(p, with_gradient);
}
void run_cross_entropy_bwd(const CrossEntropyParams& p) { run_rows(p, /*forward=*/false, /*backward=*/true); }

}  // namespace tse
