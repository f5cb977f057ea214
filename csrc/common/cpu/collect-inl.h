// The elements of a row that are above a bound. [per ISA]
#if defined(TSE_COLLECT_INL_H) == defined(TSE_ISA_TOGGLE)
#ifdef TSE_COLLECT_INL_H
#undef TSE_COLLECT_INL_H
#else
#define TSE_COLLECT_INL_H
#endif
#include "common/cpu/vec-inl.h"

// Whether any element of x[0, n) is not <= bound.
template <class T>
inline bool any_above(const T* x, int64_t n, Acc<T> bound) {
  int64_t i = 0;
  for (; i + 64 <= n; i += 64) {
    unsigned any = 0;
    for (int k = 0; k < 64; k += Accumulate<T>::kLanes) any |= mask_above(load(x + i + k), bound);
    if (any != 0) return true;
  }
  return std::any_of(x + i, x + n, [bound](const T& v) { return !(load_one(&v) <= bound); });
}

// The elements of x[begin, end) that are not <= bound, and their indices, if asked for; both may be written four
// further. Parts of 256 elements are mostly passed over; in the others little is predicted.
template <bool kIndices = true, class T>
inline int64_t collect_above(const T* x, int64_t begin, int64_t end, Acc<T> bound, Acc<T>* to,
                             uint32_t* to_indices = nullptr) {
  constexpr int kLanes = Accumulate<T>::kLanes, kWords = 4;
  int64_t count = 0, i = begin;
  const auto take = [&](int64_t at) {
    to[count] = load_one(x + at);
    if constexpr (kIndices) to_indices[count] = uint32_t(at);
    ++count;
  };
  for (; i + 64 * kWords <= end; i += 64 * kWords) {
    uint64_t masks[kWords] = {}, any = 0;
    for (int w = 0; w < kWords; ++w) {
      for (int k = 0; k < 64; k += kLanes) masks[w] |= uint64_t(mask_above(load(x + i + 64 * w + k), bound)) << k;
      any |= masks[w];
    }
    if (any == 0) continue;
    for (int w = 0; w < kWords; ++w) {
      const int64_t first = count;
      uint64_t mask = masks[w];
      do {  // four without asking whether there are so many
        for (int k = 0; k < 4; ++k, mask &= mask - 1) take(i + 64 * w + __builtin_ctzll(mask | uint64_t(1) << 63));
      } while (mask != 0);
      count = first + __builtin_popcountll(masks[w]);
    }
  }
  for (; i < end; ++i)
    if (!(load_one(x + i) <= bound)) take(i);
  return count;
}
#endif
