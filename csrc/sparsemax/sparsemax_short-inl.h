// Sparsemax of rows of up to kShort elements. [per ISA]
//
// Newton's steps wait for each other; so they are taken for as many rows at once as a vector has lanes, on a few
// elements of each: all of up to kFew, else the two largest of each of sixteen parts. tau of a part of the row is a
// lower bound for the row's (Condat 2016), and mostly no part has more than two in the support. Whether that was so
// shows in the sum of what is written; if not, the row takes further steps.
#if defined(TSE_SPARSEMAX_SHORT_INL_H) == defined(TSE_ISA_TOGGLE)
#ifdef TSE_SPARSEMAX_SHORT_INL_H
#undef TSE_SPARSEMAX_SHORT_INL_H
#else
#define TSE_SPARSEMAX_SHORT_INL_H
#endif
#include "sparsemax/sparsemax_newton-inl.h"

constexpr int64_t kShort = 4096;  // as many rows as a vector has lanes stay in the second level of cache
constexpr int64_t kFew = 64;      // elements of each row that a group of rows has room for
constexpr int64_t kPairs = 16;

// Sorts v[first, first + n) downwards, each lane for itself: odd-even mergesort (Batcher 1968), n a power of 2.
template <int first, int n, int distance, class V>
inline void merge_sorted(V* v) {
  const auto order = [v](int i, int j) {
    const V larger = vmax(v[i], v[j]);
    v[j] = vmin(v[i], v[j]);
    v[i] = larger;
  };
  if constexpr (2 * distance >= n) {
    order(first, first + distance);
  } else {
    merge_sorted<first, n, 2 * distance>(v);
    merge_sorted<first + distance, n, 2 * distance>(v);
#pragma GCC unroll 8
    for (int i = first + distance; i + distance < first + n; i += 2 * distance) order(i, i + distance);
  }
}
template <int first, int n, class V>
inline void sort_lanes(V* v) {
  if constexpr (n > 1) {
    sort_lanes<first, n / 2>(v);
    sort_lanes<first + n / 2, n / 2>(v);
    merge_sorted<first, n, 1>(v);
  }
}

// As many rows as a vector has lanes, of up to kFew elements each.
template <class T>
struct RowGroup {
  using A = Acc<T>;
  using V = Vec<T>;
  static constexpr int kRows = Accumulate<T>::kLanes, kParts = 8;
  // Of each row the largest element, tau relative to it as Newton's last step left it, and how many of those looked at
  // are above, at least 1.
  alignas(64) A max[kRows], last[kRows], step[kRows], active[kRows];

  double tau(int64_t i) const { return double(last[i]) + double(step[i]); }

  // Of all rows at once. What each sum rounds away is found by Knuth's TwoSum.
  struct Thresholds {
    alignas(64) A hi[kRows], lo[kRows];
  };
  Thresholds thresholds() const {
    const V m = load(max), a = load(last), b = load(step);
    const V t = a + b, b_in_t = t - a, t_lo = (a - (t - b_in_t)) + (b - b_in_t);
    const V hi = m + t, t_in_hi = hi - m, hi_lo = (m - (hi - t_in_hi)) + (t - t_in_hi);
    Thresholds all;
    store(all.hi, hi);
    store(all.lo, hi_lo + t_lo);
    return all;
  }

  // Sorts v. The threshold is that of the k largest for one k, and of others it is a lower bound, so that it is the
  // largest of all; relative to the largest element, which is v[0] after.
  template <int n>
  static V tau_of(V* v, A total) {
    sort_lanes<0, n>(v);
    V sum = {}, tau = splat<V>(-total);
    for (int k = 1; k < n; ++k) {
      sum += v[k] - v[0];
      tau = vmax((sum - total) * A(1.0 / (k + 1)), tau);
    }
    return tau;
  }

  // The threshold for Σ p = total. vector(i, c): elements of row i from c on, -inf behind the last.
  template <class F>
  void solve(int64_t columns, A total, const F& vector) {
    using Count = decltype(V{} > V{});
    const V low = splat<V>(-std::numeric_limits<A>::infinity());
    V z[kFew];
    int64_t n = 0;
    for (; n < columns; n += kRows) {
      V square[kRows];
#pragma GCC unroll 16
      for (int i = 0; i < kRows; ++i) square[i] = vector(i, n);
      transpose(square);
      std::memcpy(z + n, square, sizeof square);
    }
    for (; n % kParts != 0; ++n) z[n] = low;
    // The largest element of each of eight parts: their tau is a good lower bound, and costs a fraction of a step.
    V part[kParts];
    for (int k = 0; k < kParts; ++k) part[k] = z[k];
    for (int64_t c = kParts; c < n; c += kParts)
      for (int k = 0; k < kParts; ++k) part[k] = vmax(z[c + k], part[k]);
    V t = tau_of<kParts>(part, total), next;
    const V m = part[0] == low ? V{} : part[0];  // of -inf alone p is zero
    for (Count support = Count{} + int(n + 1);;) {
      const V hi = m + t, t_in_hi = hi - m, lo = (m - (hi - t_in_hi)) + (t - t_in_hi);  // hi + lo: m + t
      SumAbove<V> sum[4];
      for (int64_t c = 0; c < n; c += 4) {
        for (int k = 0; k < 4; ++k) {
          const V d = z[c + k] - hi;
          sum[k].add(d, d <= lo);  // NaN is not below
        }
      }
      const SumAbove<V> all = (sum[0] + sum[1]) + (sum[2] + sum[3]);
      const Count above = all.count(int(n));
      const V divisor = vmax(__builtin_convertvector(above, V), splat<V>(1));
      next = (all.sum - divisor * lo - total) / divisor;
      const auto shrank = above < support;  // the others stay where they are, whatever their neighbours do
      if (mask_above(shrank ? splat<V>(1) : V{}, A(0)) == 0) {
        store(active, divisor);
        break;
      }
      t = shrank ? t + next : t;
      support = above;
    }
    store(max, m);
    store(last, t);
    store(step, next);
  }
};

// The two largest elements of each of kPairs parts; to which part the last elements are added does not matter.
template <class T>
inline void two_of_each(const T* x, int64_t n, Acc<T>* to) {
  using V = Vec<T>;
  constexpr int kLanes = Accumulate<T>::kLanes, kVectors = kPairs / kLanes;
  const Acc<T> low = -std::numeric_limits<Acc<T>>::infinity();
  V first[kVectors], second[kVectors];
  for (int k = 0; k < kVectors; ++k) first[k] = second[k] = splat<V>(low);
  const auto add = [&](V a, V b, int k) {
    const V larger = vmax(a, b), smaller = vmin(a, b);
    second[k] = vmax(vmin(larger, first[k]), vmax(smaller, second[k]));
    first[k] = vmax(larger, first[k]);
  };
  int64_t i = 0;
  for (; i + 2 * kPairs <= n; i += 2 * kPairs) {
    for (int k = 0; k < kVectors; ++k) {
      const Pair<V> v = load2(x + i + 2 * k * kLanes);
      add(v.a, v.b, k);
    }
  }
  for (; i < n; i += kLanes) {
    const V v = i + kLanes <= n ? load(x + i) : load_part(x + i, n - i, low);
    add(v, splat<V>(low), 0);
  }
  for (int k = 0; k < kVectors; ++k) {
    store(to + k * kLanes, first[k]);
    store(to + kPairs + k * kLanes, second[k]);
  }
}

// Rows x(i) to y(i), which are elsewhere: a row may be written, and read again, several times.
template <class T, class X, class Y>
inline void short_rows(const X& x, const Y& y, int64_t begin, int64_t end, int64_t n) {
  using A = Acc<T>;
  const A low = -std::numeric_limits<A>::infinity();
  RowGroup<T> g;
  A largest[g.kRows][2 * kPairs] = {};
  const T* from[g.kRows];
  for (int64_t row = begin; row < end; row += g.kRows) {
    for (int64_t i = 0; i < g.kRows; ++i) from[i] = x(std::min(row + i, end - 1));
    const int64_t rows = std::min<int64_t>(g.kRows, end - row);
    if (n <= kFew) {
      g.solve(n, A(1), [&](int64_t i, int64_t j) {
        return j + g.kRows <= n ? load(from[i] + j) : load_part(from[i] + j, n - j, low);
      });
      const auto t = g.thresholds();
      for (int64_t i = 0; i < rows; ++i) write_all(from[i], y(row + i), n, Threshold<A>{t.hi[i], t.lo[i]});
      continue;
    }
    for (int64_t i = 0; i < rows; ++i) two_of_each(from[i], n, largest[i]);
    g.solve(2 * kPairs, A(1), [&](int64_t i, int64_t j) { return load(largest[i] + j); });
    // Where more than half are above, there are most likely many others, too: a sample of the row tells more of it.
    FlatRow<T> flat[g.kRows];
    int64_t flats = 0;
    for (int64_t i = 0; i < rows; ++i) {
      if (g.active[i] > A(kPairs)) flat[flats++] = {from[i], y(row + i), g.max[i], g.tau(i)};
      else write_row(from[i], y(row + i), n, g.max[i], g.tau(i));
    }
    if (flats == 0) continue;
    for (int64_t i = flats; i < g.kRows; ++i) flat[i] = flat[0];
    g.solve(kFew, A(kFew) / A(n), [&](int64_t i, int64_t j) { return load(flat[i].x + j * n / kFew); });
    for (int64_t i = 0; i < flats; ++i)
      if (g.max[i] <= flat[i].max)  // of -inf alone it is 0
        flat[i].tau = std::max(flat[i].tau, double(g.max[i]) - double(flat[i].max) + g.tau(i));
    flat_rows(flat, flats, n);
  }
}
#endif
