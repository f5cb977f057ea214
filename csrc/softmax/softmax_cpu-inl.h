// Softmax rows on the CPU. [per ISA]
//
// p = exp(x - m) / Σ exp(x - m), and backward p · (g - Σ p g). A row is read once from memory and once more from cache;
// exponentials are never stored but in the result. A row of -inf alone gives zeros.
#if defined(TSE_SOFTMAX_CPU_INL_H) == defined(TSE_ISA_TOGGLE)
#ifdef TSE_SOFTMAX_CPU_INL_H
#undef TSE_SOFTMAX_CPU_INL_H
#else
#define TSE_SOFTMAX_CPU_INL_H
#endif
#include "common/cpu/exp_sum-inl.h"
#include "common/cpu/row_map-inl.h"

template <class T, class Team>
inline void softmax_row(Team team, const T* x, T* y, int64_t n, const Logits<T, false>& logits) {
  const Acc<T> reference = row_reference(x, n, -1, logits);
  const BlockSum s = row_sums(team, n, logits, [&](int64_t begin, int64_t end) {
    return block_exp_sum(x + begin, end - begin, -1, reference, logits);
  });
  const Vec<T> m = splat<Vec<T>>(s.sum == 0 ? Acc<T>(0) : Acc<T>(s.m));
  const Vec<T> scale = splat<Vec<T>>(s.sum == 0 ? Acc<T>(0) : Acc<T>(1 / s.sum));
  for_parts(team, n, kBlock, [&](int64_t begin, int64_t end) {
    map_row(y + begin, end - begin, [&](Vec<T> v) { return logits.term(v, m) * scale; }, x + begin);
  });
}

template <class T, class Team>
inline void softmax_bwd_row(Team team, T* out, const T* p, const T* g, int64_t n) {
  const Vec<T> mean = splat<Vec<T>>(Acc<T>(sum_row(team, n, [&](Vec<T> a, Vec<T> b) { return a * b; }, p, g)));
  for_parts(team, n, kBlock, [&](int64_t begin, int64_t end) {
    map_row(out + begin, end - begin, [&](Vec<T> a, Vec<T> b) { return a * (b - mean); }, p + begin, g + begin);
  });
}

// Rows of up to kMostInLanes elements, one in each lane.
template <class T>
inline void softmax_lanes(const RowMapParams& p, int64_t begin, int64_t end) {
  using V = Vec<T>;
  const int64_t n = p.rows.n;
  const Logits<T, false> logits(LogitTransform{});
  const V low = splat<V>(-std::numeric_limits<Acc<T>>::infinity());
  const bool one_run = has_one_stride(p.rows) && has_one_stride(p.output_rows);
  V z[kMostInLanes];
  for_each_lanes<Accumulate<T>::kLanes>(p.rows, one_run, begin, end, [&](int64_t, int64_t count, Position at) {
    load_lanes(static_cast<const T*>(p.input) + at.in(p.rows), p.rows, n, count, z);
    V max = low, sum = {};
    for (int64_t c = 0; c < n; ++c) max = vmax(z[c], max);  // NaN aside
    const V m = chosen(max > low, max);
    for (int64_t c = 0; c < n; ++c) {
      z[c] = logits.term(z[c], m);
      sum += z[c];
    }
    const V scale = chosen(sum != V{}, splat<V>(1) / sum);
    for (int64_t c = 0; c < n; ++c) z[c] *= scale;
    store_lanes(static_cast<T*>(p.output) + at.in(p.output_rows), p.output_rows, n, count, z);
  });
}

template <class T>
void fwd_rows(const RowMapParams& p, int64_t begin, int64_t end) {
  if (p.rows.n <= kMostInLanes) return softmax_lanes<T>(p, begin, end);
  const Logits<T, false> logits(LogitTransform{});
  for_forward_rows<T>(p, begin, end, [&](auto team, int64_t first, int64_t last, const auto& y, const auto& x) {
    for (int64_t i = first; i < last; ++i) softmax_row(team, x(i), y(i), p.rows.n, logits);
  });
}

template <class T>
void bwd_rows(const RowMapParams& p, int64_t begin, int64_t end) {
  for_each_backward_row<T>(p, begin, end, [&](auto team, T* out, const T* output, const T* g) {
    softmax_bwd_row(team, out, output, g, p.output_rows.n);
  });
}

void softmax_fwd_rows(const RowMapParams& p, int64_t begin, int64_t end) {
  TSE_BY_DTYPE(p.dtype, fwd_rows, p, begin, end)
}
void softmax_bwd_rows(const RowMapParams& p, int64_t begin, int64_t end) {
  TSE_BY_DTYPE(p.dtype, bwd_rows, p, begin, end)
}
#endif
