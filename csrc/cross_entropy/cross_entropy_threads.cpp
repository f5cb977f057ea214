// Cross-entropy on the CPU, over torch's threads: rows, or blocks of rows, and then sums over all rows. [torch]
#include "common/host.h"
#include "common/targets.h"
#include "cross_entropy/cross_entropy.h"
#include "cross_entropy/cross_entropy_host.h"

namespace tse {
namespace {

// Σ of the weights of the counted targets; without weights their number.
template <class A>
double sum_of_weights(const CrossEntropyParams& p) {
  if (p.target == nullptr || p.weight == nullptr) return p.total_weight[1];
  const A* weight = static_cast<const A*>(p.weight);
  return sum_by_chunks(row_count(p.rows), [&](int64_t begin, int64_t end) {
    double sum = 0;
    for (int64_t row = begin; row < end; ++row) {
      const int64_t target = target_of(p, row);
      if (is_counted(p, target)) sum += double(weight[target]);
    }
    return sum;
  });
}

// Σ lse² of the counted rows.
template <class A>
double sum_of_squares(const CrossEntropyParams& p) {
  const A *m = static_cast<const A*>(p.row_m), *sum = static_cast<const A*>(p.row_sum);
  return sum_by_chunks(row_count(p.rows), [&](int64_t begin, int64_t end) {
    double squares = 0;
    for (int64_t row = begin; row < end; ++row) {
      if (!is_counted(p, target_of(p, row))) continue;
      const double lse = lse_of(p.transform, m[row], sum[row]);
      squares += lse * lse;
    }
    return squares;
  });
}

template <class A>
void run_forward(const CrossEntropyParams& p, bool with_gradient) {
  p.total_weight[0] = sum_of_weights<A>(p);
  run_cross_entropy_rows(p, /*forward=*/true, /*backward=*/with_gradient);
  if (p.loss == nullptr) return;
  double loss = sum_of_rows(static_cast<const A*>(p.row_loss), row_count(p.rows));
  double z_loss = p.z_loss_weight != 0 ? p.z_loss_weight * sum_of_squares<A>(p) : 0;
  if (p.reduction == Reduction::kMean) {
    loss /= p.total_weight[0];  // 0 / 0 is NaN
    if (p.z_loss_weight != 0) z_loss /= p.total_weight[1];
  }
  *static_cast<A*>(p.loss) = A(loss + z_loss);
  if (p.z_loss != nullptr) *static_cast<A*>(p.z_loss) = A(z_loss);
}

}  // namespace

void run_cross_entropy_rows(CrossEntropyParams p, bool forward, bool backward) {
  p.forward = forward;
  p.backward = backward;
  const bool contiguous = p.rows.stride_n == 1 && (!backward || p.grad_rows.stride_n == 1);
  // The largest logit of a row is looked for by one thread.
  parallel_rows(p, p.rows, contiguous && p.predictions == nullptr, cross_entropy_rows);
}

void run_cross_entropy_fwd(const CrossEntropyParams& p, bool with_gradient) {
  p.dtype == DType::kFloat64 ? run_forward<double>(p, with_gradient) : run_forward<float>(p, with_gradient);
}

}  // namespace tse
