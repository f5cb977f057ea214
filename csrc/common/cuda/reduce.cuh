// Reductions over the threads of a row, always in the same order: bitwise reproducible. [CUDA]
#pragma once
#include "common/cuda/vec.cuh"

namespace tse {

// A value of any size from the lane whose index differs by `mask`, word by word; `members` are the lanes that come.
template <class V>
__device__ inline V shuffle_xor(const V& v, int mask, unsigned members) {
  static_assert(sizeof(V) % 4 == 0);
  union {
    V value;
    int words[sizeof(V) / 4];
  } in = {v}, out = {v};
#pragma unroll
  for (unsigned w = 0; w < sizeof(V) / 4; ++w) out.words[w] = __shfl_xor_sync(members, in.words[w], mask);
  return out.value;
}

// The group of kLanes contiguous lanes, a power of two, that this one is in.
template <int kLanes>
__device__ inline unsigned lanes_of_group() {
  return kLanes == 32 ? 0xffffffffu : ((1u << kLanes % 32) - 1) << threadIdx.x % 32 / kLanes * kLanes;
}

// Over a group of lanes, in every one of them; they all must come here. op must be commutative, so that both lanes of a
// pair get the same bits.
template <int kLanes, class V, class Op>
__device__ inline V lanes_reduce(V v, const Op& op) {
  const unsigned members = lanes_of_group<kLanes>();
#pragma unroll
  for (int mask = kLanes / 2; mask > 0; mask /= 2) v = op(v, shuffle_xor(v, mask, members));
  return v;
}

// Of kWarps warps, a block, the value of warp threadIdx.x % kWarps; all threads of the block must come here. One
// barrier: calls in turn have memory in turn, so that nobody writes what another thread still reads. `turn` is a
// variable of the kernel, the same for all its calls.
template <int kWarps, class V>
__device__ inline V of_warps(const V& v, int& turn) {
  static_assert(kWarps <= 32 && (kWarps & (kWarps - 1)) == 0);
  TSE_SHARED(V, of_warp, 2 * kWarps);
  turn = kWarps - turn;
  if (threadIdx.x % 32 == 0) of_warp[turn + threadIdx.x / 32] = v;
  __syncthreads();
  return of_warp[turn + threadIdx.x % kWarps];
}

// Calls reduce(v, kLanes) for the lanes of a warp that share a row, and once more for the warps of a block.
template <int kRowThreads, class V, class Reduce>
__device__ inline V row_reduce_by(V v, int& turn, const Reduce& reduce) {
  if constexpr (kRowThreads == 1) return v;
  constexpr int kLanes = kRowThreads < 32 ? kRowThreads : 32;
  v = reduce(v, std::integral_constant<int, kLanes>());
  if constexpr (kRowThreads > 32) {
    constexpr int kWarps = kRowThreads / 32;
    v = reduce(of_warps<kWarps>(v, turn), std::integral_constant<int, kWarps>());
  }
  return v;
}

// What the row's threads wrote or read before is done, for all of them.
template <int kRowThreads>
__device__ inline void row_barrier() {
  if constexpr (kRowThreads > 32) __syncthreads();
  else if constexpr (kRowThreads > 1) __syncwarp(lanes_of_group<kRowThreads>());
}

// The reduction of v over the row's threads, in every one of them.
template <int kRowThreads, class V, class Op>
__device__ inline V row_reduce(V v, int& turn, const Op& op) {
  return row_reduce_by<kRowThreads>(
      v, turn, [&](const V& of_lane, auto lanes) { return lanes_reduce<decltype(lanes)::value>(of_lane, op); });
}

// The largest v of the row's threads, NaN aside.
template <int kRowThreads, class A>
__device__ inline A row_max(A v, int& turn) {
  return row_reduce<kRowThreads>(v, turn, [](A a, A b) { return fmax(a, b); });
}

}  // namespace tse
