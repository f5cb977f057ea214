// Transposition in registers: lanes that are neighbouring elements become lanes that are neighbouring rows. [per ISA]
#if defined(TSE_TRANSPOSE_INL_H) == defined(TSE_ISA_TOGGLE)
#ifdef TSE_TRANSPOSE_INL_H
#undef TSE_TRANSPOSE_INL_H
#else
#define TSE_TRANSPOSE_INL_H
#endif
#include "common/cpu/vec_types-inl.h"

// Swaps the blocks of `half` lanes that lie off the diagonal, then those inside the blocks.
template <int half, class V, size_t... lane>
[[gnu::always_inline]] inline void transpose_step(V* v, std::index_sequence<lane...>) {
  using Index = decltype(V{} > V{});
  constexpr int kLanes = sizeof...(lane);
  const Index upper = {(lane & half ? kLanes + lane - half : lane)...};
  const Index lower = {(lane & half ? kLanes + lane : lane + half)...};
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    if (i & half) continue;
    const V a = v[i], b = v[i + half];
    v[i] = __builtin_shuffle(a, b, upper);
    v[i + half] = __builtin_shuffle(a, b, lower);
  }
  if constexpr (half > 1) transpose_step<half / 2>(v, std::index_sequence<lane...>{});
}
// As many vectors as they have lanes: lane k of vector i changes places with lane i of vector k.
template <class V>
[[gnu::always_inline]] inline void transpose(V* v) {
  constexpr size_t kLanes = sizeof(V) / sizeof(V{}[0]);
  transpose_step<kLanes / 2>(v, std::make_index_sequence<kLanes>{});
}
#endif
