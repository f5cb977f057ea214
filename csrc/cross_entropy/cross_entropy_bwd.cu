// Cross-entropy backward on CUDA: grad = (exp(x) / Σ exp(x) - [c == target]) · factor. [CUDA]
// Each logit is read once and its gradient written once.
#include "common/cuda/vec.cuh"
#include "cross_entropy/cross_entropy.h"
#include "cross_entropy/exp_sum.cuh"

namespace tse {
namespace {

template <class T, int kRowThreads>
__global__ void __launch_bounds__(kBlockThreads<kRowThreads>) cross_entropy_bwd_kernel(CrossEntropyParams p) {
  using A = Acc<T>;
  const T* input = static_cast<const T*>(p.input);
  T* grad_input = static_cast<T*>(p.grad_input);
  const int64_t rows = row_count(p.rows), n = p.rows.n;
  for (int64_t row = first_row<kRowThreads>(); row < rows; row += row_step<kRowThreads>()) {
    const T* x = input + row_offset(p.rows, row);
    T* g = grad_input + row_offset(p.grad_rows, row);
    const int64_t target = target_of(p, row);
    if (target == p.ignore_index) {
      zero_row<kRowThreads>(g, p.grad_rows.stride_n, n);
      continue;
    }
    const A m = static_cast<const A*>(p.row_m)[row], sum = static_cast<const A*>(p.row_sum)[row];
    const A factor = factor_of<A>(p, row), scale = factor / sum;
    map_row<kRowThreads>(x, p.rows.stride_n, g, p.grad_rows.stride_n, n, [&](int64_t c, A v) {
      const A term = term_of(v, m);
      return c == target ? (term - sum) * scale : term * scale;
    });
  }
}

template <class T, int kRowThreads>
void launch_rows(const CrossEntropyParams& p, cudaStream_t stream) {
  launch("cross_entropy_bwd_kernel", cross_entropy_bwd_kernel<T, kRowThreads>,
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
