// Rows by lanes: as many at once as a vector has lanes, one in each lane, in any layout. [per ISA]
#if defined(TSE_LANES_INL_H) == defined(TSE_ISA_TOGGLE)
#ifdef TSE_LANES_INL_H
#undef TSE_LANES_INL_H
#else
#define TSE_LANES_INL_H
#endif
#include "common/cpu/vec-inl.h"

constexpr int64_t kMostInLanes = 256;  // contiguous rows of more elements are walked one by one
// Softmax and backward of maps: rows that are not contiguous are walked in lanes up to here; longer ones are copied.
constexpr int64_t kMostInColumns = 1024;

// ---- transposition --------------------------------------------------------------------------------------------------

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

// ---- rows -----------------------------------------------------------------------------------------------------------

// Where a group of rows begins; the tensors of a call have the same outer and inner.
struct Position {
  int64_t outer, inner;
  int64_t in(const Rows& rows) const { return outer * rows.stride_outer + inner * rows.stride_inner; }
};

// Calls f(row, count, position) for groups of up to kLanes rows that have one stride. one_run: all rows have.
template <int kLanes, class F>
[[gnu::always_inline]] inline void for_each_lanes(const Rows& rows, bool one_run, int64_t begin, int64_t end,
                                                  const F& f) {
  const int64_t run = one_run ? row_count(rows) : rows.inner;
  Position at = {begin / run, begin % run};
  for (int64_t row = begin, count; row < end; row += count) {
    count = std::min<int64_t>({kLanes, end - row, run - at.inner});
    f(row, count, at);
    at.inner += count;
    if (at.inner == run) at = {at.outer + 1, 0};
  }
}

// Class c of `count` rows, the first of them at x; 0 in the other lanes.
template <class T>
[[gnu::always_inline]] inline Vec<T> load_class(const T* x, const Rows& rows, int64_t c, int64_t count) {
  x += c * rows.stride_n;
  if (rows.stride_inner == 1 && count == Accumulate<T>::kLanes) return load(x);
  if (rows.stride_inner == 1) return load_part(x, count, Acc<T>(0));
  Vec<T> v = {};
  for (int64_t i = 0; i < count; ++i) v[i] = load_one(x + i * rows.stride_inner);
  return v;
}
template <class T>
[[gnu::always_inline]] inline void store_class(T* x, const Rows& rows, int64_t c, int64_t count, Vec<T> v) {
  x += c * rows.stride_n;
  if (rows.stride_inner == 1 && count == Accumulate<T>::kLanes) return store(x, v);
  if (rows.stride_inner == 1) return store_part(x, count, v);
  for (int64_t i = 0; i < count; ++i) store_one(x + i * rows.stride_inner, v[i]);
}

// z[c] = class c < n of `count` rows; room for n rounded up to whole vectors.
template <class T>
[[gnu::flatten]] inline void load_lanes(const T* x, const Rows& rows, int64_t n, int64_t count, Vec<T>* z) {
  constexpr int kLanes = Accumulate<T>::kLanes;
  if (rows.stride_n != 1) {
    const int64_t stride = rows.stride_n;
    if (rows.stride_inner != 1 || count != kLanes) {
      for (int64_t c = 0; c < n; ++c) z[c] = load_class(x, rows, c, count);
      return;
    }
    for (int64_t c = 0; c < n; ++c) {
      z[c] = load(x + c * stride);
      // The next rows' elements, into L2: in L1 those of many planes would displace each other.
      __builtin_prefetch(x + c * stride + kLanes, 0, 2);
    }
    return;
  }
  const T* row[kLanes];
  for (int i = 0; i < kLanes; ++i) row[i] = i == 0 ? x : i < count ? row[i - 1] + rows.stride_inner : row[i - 1];
  for (int64_t c = 0; c < n; c += kLanes) {
    Vec<T> square[kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) {
      const T* from = row[i] + c;
      square[i] = c + kLanes <= n ? load(from) : load_part(from, n - c, Acc<T>(0));
    }
    transpose(square);
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) z[c + i] = square[i];
  }
}
template <class T>
[[gnu::flatten]] inline void store_lanes(T* x, const Rows& rows, int64_t n, int64_t count, const Vec<T>* z) {
  constexpr int kLanes = Accumulate<T>::kLanes;
  if (rows.stride_n != 1) {
    const int64_t stride = rows.stride_n;
    if (rows.stride_inner == 1 && count == kLanes)
      for (int64_t c = 0; c < n; ++c) store(x + c * stride, z[c]);
    else
      for (int64_t c = 0; c < n; ++c) store_class(x, rows, c, count, z[c]);
    return;
  }
  for (int64_t c = 0; c < n; c += kLanes) {
    Vec<T> square[kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) square[i] = z[c + i];
    transpose(square);
    for (int64_t i = 0; i < count; ++i) {
      T* to = x + i * rows.stride_inner + c;
      if (c + kLanes <= n) store(to, square[i]);
      else store_part(to, n - c, square[i]);
    }
  }
}
#endif
