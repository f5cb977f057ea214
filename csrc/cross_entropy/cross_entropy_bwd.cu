// Cross-entropy backward on CUDA: grad_s = p · softmax - t · target (cross_entropy.h). [CUDA]
// Each logit is read once and its gradient written once.
#include "common/cuda/vec.cuh"
#include "cross_entropy/coefficients.cuh"
#include "cross_entropy/cross_entropy.h"
#include "cross_entropy/exp_sum.cuh"

namespace tse {
namespace {

// kGeneral: with softcap or coefficients of all classes.
template <class T, int kRowThreads, bool kGeneral>
__global__ void __launch_bounds__(kBlockThreads<kRowThreads>) cross_entropy_bwd_kernel(CrossEntropyParams p) {
  using A = Acc<T>;
  const T* input = static_cast<const T*>(p.input);
  T* grad_input = static_cast<T*>(p.grad_input);
  const int64_t rows = row_count(p.rows), n = p.rows.n;
  const Logits<A> logits(p.transform);
  for (int64_t row = first_row<kRowThreads>(); row < rows; row += row_step<kRowThreads>()) {
    const T* x = input + row_offset(p.rows, row);
    T* g = grad_input + row_offset(p.grad_rows, row);
    const int64_t target = target_of(p, row);
    if (!is_counted(p, target)) {
      zero_row<kRowThreads>(g, p.grad_rows.stride_n, n);
      continue;
    }
    const A m = static_cast<const A*>(p.row_m)[row], sum = static_cast<const A*>(p.row_sum)[row];
    const A w = weight_of<A>(p, target);
    const GradFactors f =
        grad_factors<A>(p, row, p.z_loss_weight == 0 ? 0.0 : lse_of(m, sum),
                        p.row_mass == nullptr ? double(w) : double(static_cast<const A*>(p.row_mass)[row]));
    const A scale = A(f.softmax / double(sum)), of_target = A(f.target);
    const Coefficients<T> coefficients(p, row);
    map_row<kRowThreads>(x, p.rows.stride_n, g, p.grad_rows.stride_n, n, [&](int64_t c, A v) {
      if constexpr (kGeneral) {
        v = logits.cap(v);
        A grad = logits.term(v, m) * scale - coefficients(c) * of_target;
        if (c == target) grad -= w * of_target;
        return logits.capped ? grad * (1 - v * v) : grad;
      } else {
        const A term = logits.term(v, m);
        // The target's probability and what is taken from it may be equal, and then their difference is 0.
        return c == target ? A(f.softmax * (double(term) / double(sum)) - double(w) * f.target) : term * scale;
      }
    });
  }
}

template <class T, int kRowThreads>
void launch_rows(const CrossEntropyParams& p, cudaStream_t stream) {
  launch(
      "cross_entropy_bwd_kernel",
      p.is_general() ? cross_entropy_bwd_kernel<T, kRowThreads, true> : cross_entropy_bwd_kernel<T, kRowThreads, false>,
      grid_for(row_count(p.rows), kRowsPerBlock<kRowThreads>), kBlockThreads<kRowThreads>, 0, stream, p);
}

template <class T>
void launch_bwd(const CrossEntropyParams& p, cudaStream_t stream) {
  if (row_count(p.rows) == 0) return;
  if (p.rows.stride_n != 1 || p.grad_rows.stride_n != 1) launch_rows<T, 1>(p, stream);
  else if (p.rows.n <= 1024) launch_rows<T, 32>(p, stream);
  else if (p.rows.n <= 8192) launch_rows<T, 128>(p, stream);
  else launch_rows<T, 512>(p, stream);
}

}  // namespace

void launch_cross_entropy_bwd(const CrossEntropyParams& p, cudaStream_t stream) {
  TSE_LAUNCH_BY_DTYPE(p, launch_bwd, p, stream)
}

}  // namespace tse
