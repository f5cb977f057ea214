// Log-probabilities at given classes and entropy, backward on CUDA. [CUDA]
// Each logit is read once and its gradient written once; then the gradients of the classes that were asked for are
// written anew.
#include "common/cuda/row.cuh"
#include "selective_log_softmax/exponent.cuh"

namespace tse {
namespace {

template <class T, int kRowThreads>
__global__ void __launch_bounds__(kBlockThreads<kRowThreads>, kBlocksAtLeast<T, kRowThreads>)
    selective_log_softmax_bwd_kernel(SelectiveLogSoftmaxParams p, Exponent<Acc<T>> exponent) {
  using A = Acc<T>;
  int turn = 0;
  const int64_t rows = row_count(p.rows), n = p.rows.n, count = p.grad_logp == nullptr ? 0 : p.k;
  const int lane = threadIdx.x % kRowThreads;
  for (int64_t row = first_row<kRowThreads>(); row < rows; row += row_step<kRowThreads>()) {
    const T* x = static_cast<const T*>(p.input) + row_offset(p.rows, row);
    T* g = static_cast<T*>(p.grad_input) + row_offset(p.grad_rows, row);
    const A* grad_logp = static_cast<const A*>(p.grad_logp) + row * count;
    double total = 0;
    for (int64_t k = lane; k < count; k += kRowThreads) total += double(grad_logp[k]);
    total = row_reduce<kRowThreads>(total, turn, [](double a, double b) { return a + b; });
    const SelectiveGrad<A> f = selective_grad<A>(p, row, total);
    const A half_m = f.m * A(0.5);
    const bool has_entropy = p.grad_entropy != nullptr, has_cap = exponent.capped;
    const StoredOutput<T> out(g, p.grad_rows.stride_n, x);
    map_row<T>(KeptRow<kRowThreads, T, 2>({x, p.rows.stride_n}, n), out, [&](int64_t, A v) {
      const A capped = exponent.cap(v), t = exponent(capped, half_m);
      const A grad = exp2_of(t) * (has_entropy ? -f.level - f.slope * (t - f.mean) : -f.level);
      return has_cap ? grad * (A(1) - capped * capped) : grad;
    });
    row_barrier<kRowThreads>();  // before others write what they were asked for
    for (int64_t k = lane; k < count; k += kRowThreads) {
      const int64_t c = asked_class(p, row, k);
      double grad = 0;
      bool is_first = true;  // of those that ask for this class
      for (int64_t j = 0; j < count; ++j) {
        if (index_of(p, row, j) != c) continue;
        is_first &= j >= k;
        grad += double(grad_logp[j]);
      }
      if (!is_first) continue;
      const A capped = exponent.cap(to_acc(x[c * p.rows.stride_n])), t = exponent(capped, half_m), term = exp2_of(t);
      const double probability = double(term) / double(f.sum);
      // 1 - probability, with all its digits of a class that has most.
      const double complement =
          2 * term > f.sum ? double(static_cast<const A*>(p.row_others)[row]) / double(f.sum) : 1 - probability;
      double of_class = (grad * complement - (total - grad) * probability) / p.transform.temperature;
      if (has_entropy) of_class -= double(term) * double(f.slope) * (double(t) - double(f.mean));
      if (has_cap) of_class *= 1 - double(capped) * double(capped);
      g[c * p.grad_rows.stride_n] = from_acc<T>(A(of_class));
    }
  }
}

template <class T>
void launch_bwd(const SelectiveLogSoftmaxParams& p, cudaStream_t stream) {
  if (row_count(p.rows) == 0) return;
  with_plan<T, false, false>(p.rows.n, p.rows.stride_n == 1 && p.grad_rows.stride_n == 1, [&](auto plan) {
    constexpr int kRowThreads = decltype(plan)::kThreads, kThreads = kBlockThreads<kRowThreads>;
    const auto kernel = selective_log_softmax_bwd_kernel<T, kRowThreads>;
    launch("selective_log_softmax_bwd_kernel", kernel,
           grid_for(row_count(p.rows), kRowsPerBlock<kRowThreads>, kernel, kThreads, 0), kThreads, 0, stream, p,
           Exponent<Acc<T>>(p.transform));
  });
}

}  // namespace

void launch_selective_log_softmax_bwd(const SelectiveLogSoftmaxParams& p, cudaStream_t stream) {
  TSE_BY_DTYPE(p.dtype, launch_bwd, p, stream)
}

}  // namespace tse
