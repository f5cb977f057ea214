// Sparsemax backward on CUDA: g - mean of g over the support on the support, 0 elsewhere. [CUDA]
//
// The probabilities are read once by 16 bytes, and kept until the mean is known, in registers or shared memory; of
// grad_output only the vectors that have an element of the support, twice, the second time from cache.
#include "common/cuda/reduce.cuh"
#include "common/cuda/row.cuh"
#include "sparsemax/sparsemax.h"
#include "sparsemax/support.cuh"

namespace tse {
namespace {

template <class T>
__device__ inline bool all_bits_zero(const Vec<T>& v) {
  const uint4 raw = bits_as<uint4>(v);
  return (raw.x | raw.y | raw.z | raw.w) == 0;
}

template <class T, int kRowThreads, int kVectors>
__global__ void __launch_bounds__(kBlockThreads<kRowThreads>, kBlocksAtLeast<T, kRowThreads, kVectors>)
    sparsemax_bwd_kernel(RowMapParams p, int kept_vectors) {
  using A = Acc<T>;
  TSE_DYNAMIC_SHARED(uint4, kept);
  int turn = 0;
  const int64_t rows = row_count(p.output_rows), g_stride = p.grad_output_rows.stride_n;
  for (int64_t index = first_row<kRowThreads>(); index < rows; index += row_step<kRowThreads>()) {
    const T* const y = static_cast<const T*>(p.output) + row_offset(p.output_rows, index);
    const T* const g = static_cast<const T*>(p.grad_output) + row_offset(p.grad_output_rows, index);
    T* const out = static_cast<T*>(p.grad_input) + row_offset(p.grad_input_rows, index);
    Row<T, kRowThreads, kVectors, 2> row(y, p.output_rows.n, p.output_rows.stride_n,
                                         kept + threadIdx.x / kRowThreads * kept_vectors, kept_vectors);
    const bool g_alike = is_aligned_like(y, g);
    row.load();
    SupportSum<A> own;  // of grad_output; NaN where a probability is
    const auto add = [&](T probability, T grad) {
      const A v = to_acc(probability);
      if (!(v <= 0)) own.add(to_acc(grad) + (v - v));
    };
    row.read(
        true,
        [&](int64_t i, const Vec<T>& v) {
          if (all_bits_zero(v)) return;
          const Vec<T> of_g = row.vector_at(g, g_alike, i);
#pragma unroll
          for (int k = 0; k < Vec<T>::kSize; ++k) add(v.v[k], of_g.v[k]);
          own.join_part();
        },
        [&](int64_t i, T v) {
          add(v, g[i * g_stride]);
          own.join_part();
        });
    const auto s = row_reduce<kRowThreads>(own.template total<SumOf<T, kRowThreads, kVectors>>(), turn,
                                           [](const auto& a, const auto& b) { return join(a, b); });
    const A mean = A(s.sum / decltype(s.sum)(s.count));
    const auto gradient = [&](T probability, T grad) {
      return from_acc<T>(to_acc(probability) <= 0 ? A(0) : to_acc(grad) - mean);
    };
    row.map_vectors(
        out, p.grad_input_rows.stride_n,
        [&](int64_t i, Vec<T> v) {
          if (all_bits_zero(v)) return v;
          const Vec<T> of_g = row.vector_at(g, g_alike, i);
#pragma unroll
          for (int k = 0; k < Vec<T>::kSize; ++k) v.v[k] = gradient(v.v[k], of_g.v[k]);
          return v;
        },
        [&](int64_t i, T v) { return gradient(v, g[i * g_stride]); });
  }
}

template <class T>
void launch_bwd(const RowMapParams& p, cudaStream_t stream) {
  const int64_t rows = row_count(p.output_rows), n = p.output_rows.n;
  if (rows == 0) return;
  with_plan<T, true>(n, p.output_rows.stride_n == 1 && p.grad_input_rows.stride_n == 1, [&](auto plan) {
    using Plan = decltype(plan);
    constexpr int kRowThreads = Plan::kThreads, kThreads = kBlockThreads<kRowThreads>,
                  kRows = kRowsPerBlock<kRowThreads>;
    const bool keeps = kRowThreads > 1 && Plan::kVectors == 0;
    const int kept = keeps ? kept_vectors(device_limits(), n * sizeof(T) / 16, kRows) : 0;
    const size_t shared = size_t(kept) * 16 * kRows;
    const auto kernel = sparsemax_bwd_kernel<T, kRowThreads, Plan::kVectors>;
    launch("sparsemax_bwd_kernel", kernel, grid_for(rows, kRows, kernel, kThreads, shared), kThreads, shared, stream, p,
           kept);
  });
}

}  // namespace

void launch_sparsemax_bwd(const RowMapParams& p, cudaStream_t stream) { TSE_BY_DTYPE(p.dtype, launch_bwd, p, stream) }

}  // namespace tse
