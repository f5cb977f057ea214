// Newton's steps of sparsemax over one row, and what writes it. [per ISA]
#if defined(TSE_SPARSEMAX_NEWTON_INL_H) == defined(TSE_ISA_TOGGLE)
#ifdef TSE_SPARSEMAX_NEWTON_INL_H
#undef TSE_SPARSEMAX_NEWTON_INL_H
#else
#define TSE_SPARSEMAX_NEWTON_INL_H
#endif
#include "sparsemax/sparsemax_vec-inl.h"

constexpr double kClose = 5e-4;  // f - 1 from where Newton's step, which leaves about half its square, is the last

// tau as the sum of two numbers: hi, and what its rounding left. A is a number or a vector.
template <class A>
struct Threshold {
  A hi, lo;
  template <class V>
  V excess(V x) const {  // x - tau
    return (x - hi) - lo;
  }
  template <class V>
  V probability(V x) const {  // NaN where tau is
    return vmax(V{}, excess(x));
  }
};
template <class A>
inline Threshold<A> threshold(A max, double tau) {  // tau: relative to max
  const A hi = A(double(max) + tau);
  return {hi, A((double(max) - double(hi)) + tau)};
}

// a + b and what it rounds away (Knuth's TwoSum).
template <class V>
inline Threshold<V> two_sum(V a, V b) {
  const V hi = a + b, b_in_hi = hi - a;
  return {hi, (a - (hi - b_in_hi)) + (b - b_in_hi)};
}

// Writes the probabilities and returns their sum.
template <class T>
inline double write_all(const T* x, T* y, int64_t n, const Threshold<Acc<T>>& t) {
  double total = 0;
  for (int64_t begin = 0; begin < n; begin += kSumBlock) {
    Vec<T> sum[2] = {};
    const auto probability = [&](int k, Vec<T> v) {
      const Vec<T> p = t.probability(v);
      sum[k] += p;
      return p;
    };
    map_row_by_sum(y + begin, std::min(kSumBlock, n - begin), probability, x + begin);
    total += double(reduce_add(sum[0] + sum[1]));
  }
  return total;
}

// f(t) = Σ (x - t)_+ at t = max + at.
struct Excess {
  double at = 0, f = 0, count = 0;  // how many x are above t
  // Newton's step for f = 1: to a lower bound of the threshold, wherever it began; above all x, to the lowest.
  double step() const { return count > 0 ? at + (f - 1) / count : -1; }
  // Newton's step for f^(1/4) = 1, which is straighter than f where the x fall off as they mostly do. Below f = 3 it
  // leads to below the largest x.
  double guess() const { return f > 0 && f < 3 ? at + 4 * (f - std::sqrt(f * std::sqrt(f))) / count : step(); }
};
template <class T>
inline Excess excess_at(const T* x, int64_t n, Acc<T> max, double at) {
  const Threshold<Acc<T>> t = threshold(max, at);
  Excess e{at};
  // Σ (x - hi) - count · lo: one subtraction less for each.
  const auto add = [&](SumAbove<Vec<T>>& s, Vec<T> v) {
    const Vec<T> d = v - t.hi;
    s.add(d, d <= t.lo);
  };
  const auto block_done = [&](double sum, double count) {
    e.f += sum - count * double(t.lo);
    e.count += count;
  };
  sum_above<T>(n, add, block_done, x);
  return e;
}

// Newton's steps from a lower bound, until they leave no more elements behind, or f - 1 is at most `tolerance`.
template <class T>
inline Excess newton(const T* x, int64_t n, Acc<T> max, double tau, double tolerance = 0) {
  Excess e = excess_at(x, n, max, tau);
  for (double support = double(n) + 1; e.f - 1 > tolerance && e.count < support;) {
    support = e.count;
    e = excess_at(x, n, max, e.step());
  }
  return e;
}

// Writes a row, given a lower bound of its threshold that mostly is the threshold. Whether it is shows in the sum of
// what is written; if not, further steps are taken.
template <class T>
inline void write_row(const T* x, T* y, int64_t n, Acc<T> max, double tau) {
  for (double support = double(n) + 1;;) {
    const double sum = write_all(x, y, n, threshold(max, tau));
    if (sum <= 1 + 4 * std::numeric_limits<Acc<T>>::epsilon()) break;
    const Excess e = newton(x, n, max, tau, kClose);
    if (e.count >= support) break;
    tau = e.step();
    support = e.count;
  }
}

// Rows with so many elements in their support that all are looked at.
template <class T>
struct FlatRow {
  const T* x;
  T* y;
  Acc<T> max;
  double tau;  // near the threshold
};
template <class T>
inline void flat_rows(FlatRow<T>* rows, int64_t count, int64_t n) {
  Excess e[kFloats];
  for (int64_t i = 0; i < count; ++i) e[i] = excess_at(rows[i].x, n, rows[i].max, rows[i].tau);
  bool close = false;
  for (int pass = 1; pass < 8 && !close; ++pass) {  // over all rows, as each waits for its sums
    close = true;
    for (int64_t i = 0; i < count; ++i) {
      const double away = std::abs(e[i].f - 1);
      if (!(away > kClose)) continue;
      e[i] = excess_at(rows[i].x, n, rows[i].max, away > 0.02 ? e[i].guess() : e[i].step());
      close = false;
    }
  }
  for (int64_t i = 0; i < count; ++i) write_row(rows[i].x, rows[i].y, n, rows[i].max, e[i].step());
}
#endif
