// Reductions over the threads of a row, always in the same order: bitwise reproducible. [CUDA]
#pragma once
#include "common/cuda/vec.cuh"

namespace tse {

// A value of any size from the lane whose index differs by `mask`, word by word.
template <class V>
__device__ inline V shuffle_xor(const V& v, int mask) {
  static_assert(sizeof(V) % 4 == 0);
  union {
    V value;
    int words[sizeof(V) / 4];
  } in = {v}, out = {v};
#pragma unroll
  for (unsigned w = 0; w < sizeof(V) / 4; ++w) out.words[w] = __shfl_xor_sync(0xffffffffu, in.words[w], mask);
  return out.value;
}

// Over kLanes neighbouring lanes, a power of two, in every one of them. The whole warp must come here.
template <int kLanes = 32, class V, class Op>
__device__ inline V warp_reduce(V v, const Op& op) {
#pragma unroll
  for (int mask = kLanes / 2; mask > 0; mask /= 2) v = op(v, shuffle_xor(v, mask));
  return v;
}

// The reduction of v over the row's threads, in every one of them. op must be commutative, so that both lanes of a pair
// get the same bits. For rows of a block all its threads must come here.
template <int kRowThreads, class V, class Op>
__device__ inline V row_reduce(V v, const Op& op) {
  if constexpr (kRowThreads == 1) return v;
  v = warp_reduce(v, op);
  if constexpr (kRowThreads > 32) {
    constexpr int kWarps = kRowThreads / 32;
    static_assert(kWarps <= 32 && (kWarps & (kWarps - 1)) == 0);
    TSE_SHARED(V, partial, kWarps);
    if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = v;
    __syncthreads();
    v = partial[threadIdx.x % kWarps];
#pragma unroll
    for (int mask = kWarps / 2; mask > 0; mask /= 2) v = op(v, shuffle_xor(v, mask));
    __syncthreads();  // the next reduction writes `partial`
  }
  return v;
}

}  // namespace tse
