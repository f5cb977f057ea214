// Backward of sparsemax and entmax on CUDA: s (g - Σ s g / Σ s) with s = p^(2 - alpha), 0 off the support. [CUDA]
//
// The probabilities are read once by 16 bytes, and kept until the mean is known, in registers or shared memory; of
// grad_output only the vectors that have an element of the support, twice, the second time from cache.
#pragma once
#include "common/cuda/reduce.cuh"
#include "common/cuda/row.cuh"
#include "common/row_params.h"
#include "entmax/threshold.cuh"

namespace tse {

template <class T>
__device__ inline bool all_bits_zero(const Vec<T>& v) {
  const uint4 raw = bits_as<uint4>(v);
  return (raw.x | raw.y | raw.z | raw.w) == 0;
}

template <class T, int kRowThreads, int kVectors, class Policy>
__global__ void __launch_bounds__(kBlockThreads<kRowThreads>, kBlocksAtLeast<T, kRowThreads, kVectors>)
    entmax_bwd_kernel(RowMapParams p, Policy policy, int kept_vectors) {
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
    SupportSum<A, Policy::kCounts> own;  // of s g and s; NaN where a probability is
    const auto add = [&](T probability, T grad) {
      const A v = to_acc(probability), s = policy.weight(v);
      if (!(v <= 0)) own.add(s * (to_acc(grad) + (v - v)), s);
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
    const auto total = row_reduce<kRowThreads>(own.template total<SumOf<T, kRowThreads, kVectors>>(), turn, Join());
    const A mean = A(total.sum / decltype(total.sum)(total.weight));
    const auto gradient = [&](T probability, T grad) {
      const A v = to_acc(probability);
      return from_acc<T>(v <= 0 ? A(0) : policy.weight(v) * (to_acc(grad) - mean));
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

template <class T, class Policy>
void launch_entmax_bwd(const RowMapParams& p, const Policy& policy, cudaStream_t stream) {
  const int64_t rows = row_count(p.output_rows), n = p.output_rows.n;
  if (rows == 0) return;
  with_plan<T, true>(n, p.output_rows.stride_n == 1 && p.grad_input_rows.stride_n == 1, [&](auto plan) {
    constexpr int kRowThreads = decltype(plan)::kThreads, kVectors = decltype(plan)::kVectors;
    constexpr int kThreads = kBlockThreads<kRowThreads>, kRows = kRowsPerBlock<kRowThreads>;
    const bool keeps = kRowThreads > 1 && kVectors == 0;
    const int kept = keeps ? kept_vectors(device_limits(), n * sizeof(T) / 16, kRows) : 0;
    const size_t shared = size_t(kept) * 16 * kRows;
    const auto kernel = entmax_bwd_kernel<T, kRowThreads, kVectors, Policy>;
    launch("entmax_bwd_kernel", kernel, grid_for(rows, kRows, kernel, kThreads, shared), kThreads, shared, stream, p,
           policy, kept);
  });
}

}  // namespace tse
