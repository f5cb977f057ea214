// Sparsemax backward on CUDA: g - mean of g over the support on the support, 0 elsewhere. [CUDA]
// Two passes over the row, the second from L1 or L2.
#include "common/cuda/reduce.cuh"
#include "entmax/entmax.h"

namespace tse {
namespace {

struct Support {
  double sum;     // of grad_output over the support
  int64_t count;  // its size; NaN belongs to it
};

template <class T, int kRowThreads>
__global__ void __launch_bounds__(kBlockThreads<kRowThreads>) sparsemax_bwd_kernel(EntmaxParams p) {
  using A = Acc<T>;
  const int64_t rows = row_count(p.output_rows), n = p.output_rows.n;
  const int lane = threadIdx.x % kRowThreads;
  for (int64_t row = first_row<kRowThreads>(); row < rows; row += row_step<kRowThreads>()) {
    const T* y = static_cast<const T*>(p.output) + row_offset(p.output_rows, row);
    const T* g = static_cast<const T*>(p.grad_output) + row_offset(p.grad_output_rows, row);
    T* out = static_cast<T*>(p.grad_input) + row_offset(p.grad_input_rows, row);
    A sum = 0;
    Support s = {0, 0};
    for (int64_t i = lane; i < n; i += kRowThreads) {
      if (to_acc(y[i * p.output_rows.stride_n]) <= 0) continue;
      sum += to_acc(g[i * p.grad_output_rows.stride_n]);
      ++s.count;
    }
    s.sum = sum;
    s = row_reduce<kRowThreads>(s, [](Support a, Support b) { return Support{a.sum + b.sum, a.count + b.count}; });
    const A mean = A(s.sum / double(s.count));
    for (int64_t i = lane; i < n; i += kRowThreads) {
      const A probability = to_acc(y[i * p.output_rows.stride_n]);
      const A inside =
          (to_acc(g[i * p.grad_output_rows.stride_n]) - mean) + (probability - probability);  // NaN spreads
      out[i * p.grad_input_rows.stride_n] = from_acc<T>(probability <= 0 ? A(0) : inside);
    }
  }
}

template <class T, int kRowThreads>
void launch_rows(const EntmaxParams& p, cudaStream_t stream) {
  launch("sparsemax_bwd_kernel", sparsemax_bwd_kernel<T, kRowThreads>,
         grid_for(row_count(p.output_rows), kRowsPerBlock<kRowThreads>), kBlockThreads<kRowThreads>, 0, stream, p);
}

template <class T>
void launch_bwd(const EntmaxParams& p, cudaStream_t stream) {
  if (row_count(p.output_rows) == 0) return;
  if (p.output_rows.stride_n != 1) launch_rows<T, 1>(p, stream);
  else if (p.output_rows.n <= 1024) launch_rows<T, 32>(p, stream);
  else launch_rows<T, 256>(p, stream);
}

}  // namespace

void launch_sparsemax_bwd(const EntmaxParams& p, cudaStream_t stream) { TSE_LAUNCH_BY_DTYPE(p, launch_bwd, p, stream) }

}  // namespace tse
