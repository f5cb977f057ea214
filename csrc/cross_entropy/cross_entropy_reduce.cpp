// Cross-entropy on the CPU: the targets are counted before the rows, and the rows' losses reduced after them. [torch]
#include "common/host.h"
#include "common/targets.h"
#include "cross_entropy/cross_entropy.h"
#include "cross_entropy/cross_entropy_host.h"

namespace tse {
namespace {

// Fills in p.total_weight. A target that is no class raises before anything is written.
template <class A>
void count_targets(const CrossEntropyParams& p) {
  const int64_t rows = row_count(p.rows), n = p.rows.n;
  const auto count = [&](const auto* target) {
    return count_classes("cross_entropy", "target", target, rows, n, p.ignore_index);
  };
  double counted = n == 0 ? 0 : double(rows);  // class probabilities all count; of no classes the mean is NaN
  if (p.target != nullptr) {
    counted =
        p.target_is_int32 ? count(static_cast<const int32_t*>(p.target)) : count(static_cast<const int64_t*>(p.target));
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

// Σ row_loss and the z-loss, divided for the mean.
template <class A>
void reduce_loss(const CrossEntropyParams& p) {
  const A* row_loss = static_cast<const A*>(p.row_loss);
  const bool mean = p.reduction == Reduction::kMean;
  double sum = sum_of_rows(row_loss, row_count(p.rows));
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

template <class A>
void run(const CrossEntropyParams& p, bool with_gradient) {
  count_targets<A>(p);
  run_rows(p, /*forward=*/true, /*backward=*/with_gradient);
  if (p.loss != nullptr) reduce_loss<A>(p);
}

}  // namespace

void run_cross_entropy_fwd(const CrossEntropyParams& p, bool with_gradient) {
  if (p.dtype == DType::kFloat64) run<double>(p, with_gradient);
  else run<float>(p, with_gradient);
}

}  // namespace tse
