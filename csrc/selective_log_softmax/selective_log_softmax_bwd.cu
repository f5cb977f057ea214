// Log-probabilities at given classes and entropy, backward on CUDA. [CUDA]
// Each logit is read once and its gradient written once; then the gradients of the classes that were asked for are
// written anew.
#include "common/cuda/reduce.cuh"
#include "selective_log_softmax/exponent.cuh"

namespace tse {
namespace {

// What the row's threads wrote before is there, and may be overwritten.
template <int kRowThreads>
__device__ inline void row_barrier() {
  if constexpr (kRowThreads > 32) __syncthreads();
  else if constexpr (kRowThreads > 1) __syncwarp();
}

template <class T, int kRowThreads>
__global__ void __launch_bounds__(kBlockThreads<kRowThreads>, kBlocksAtLeast<T, kRowThreads>)
    selective_log_softmax_bwd_kernel(SelectiveLogSoftmaxParams p) {
  using A = Acc<T>;
  const Exponent<A> exponent(p.transform);
  const int64_t rows = row_count(p.rows), n = p.rows.n, count = p.grad_logp == nullptr ? 0 : p.k;
  const int lane = threadIdx.x % kRowThreads;
  for (int64_t row = first_row<kRowThreads>(); row < rows; row += row_step<kRowThreads>()) {
    const T* x = static_cast<const T*>(p.input) + row_offset(p.rows, row);
    T* g = static_cast<T*>(p.grad_input) + row_offset(p.grad_rows, row);
    const A* grad_logp = static_cast<const A*>(p.grad_logp) + row * count;
    double total = 0;
    for (int64_t k = lane; k < count; k += kRowThreads) total += double(grad_logp[k]);
    total = row_reduce<kRowThreads>(total, [](double a, double b) { return a + b; });
    const SelectiveGrad<A> f = selective_grad<A>(p, row, total);
    const A half_m = f.m * A(0.5);
    const bool has_entropy = p.grad_entropy != nullptr, has_cap = exponent.capped;
    map_row<kRowThreads>(x, p.rows.stride_n, g, p.grad_rows.stride_n, n, [&](int64_t, A v) {
      const A capped = exponent.cap(v), t = exponent(capped, half_m);
      const A grad = exp2_of(t) * (has_entropy ? -f.level - f.slope * (t - f.mean) : -f.level);
      return has_cap ? grad * (A(1) - capped * capped) : grad;
    });
    row_barrier<kRowThreads>();
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

template <class T, int kRowThreads>
void launch_rows(const SelectiveLogSoftmaxParams& p, cudaStream_t stream) {
  launch("selective_log_softmax_bwd_kernel", selective_log_softmax_bwd_kernel<T, kRowThreads>,
         grid_for(row_count(p.rows), kRowsPerBlock<kRowThreads>), kBlockThreads<kRowThreads>, 0, stream, p);
}

template <class T>
void launch_bwd(const SelectiveLogSoftmaxParams& p, cudaStream_t stream) {
  if (row_count(p.rows) == 0) return;
  if (p.rows.stride_n != 1 || p.grad_rows.stride_n != 1) launch_rows<T, 1>(p, stream);
  else if (p.rows.n <= 1024) launch_rows<T, 32>(p, stream);
  else if (p.rows.n <= 8192) launch_rows<T, 128>(p, stream);
  else launch_rows<T, 512>(p, stream);
}

}  // namespace

void launch_selective_log_softmax_bwd(const SelectiveLogSoftmaxParams& p, cudaStream_t stream) {
  TSE_LAUNCH_BY_DTYPE(p, launch_bwd, p, stream)
}

}  // namespace tse
