// Newton's steps of sparsemax over one row, and what writes it. [per ISA]
#if defined(TSE_SPARSEMAX_NEWTON_INL_H) == defined(TSE_ISA_TOGGLE)
#ifdef TSE_SPARSEMAX_NEWTON_INL_H
#undef TSE_SPARSEMAX_NEWTON_INL_H
#else
#define TSE_SPARSEMAX_NEWTON_INL_H
#endif
#include "sparsemax/sparsemax_vec-inl.h"

constexpr double kClose = 5e-4;   // f - 1 from where Newton's step, which leaves about half its square, is the last

// tau as the sum of two numbers: hi, and what its rounding left.
template <class A>
struct Threshold {
  A hi, lo;
  template <class V>
  V excess(V x) const {  // x - tau
    return (x - hi) - lo;
  }
};
template <class A>
inline Threshold<A> threshold(A max, double tau) {  // tau: relative to max
  const A hi = A(double(max) + tau);
  return {hi, A((double(max) - double(hi)) + tau)};
}

// y = max(x - tau, 0), and NaN where tau is. Returns the sum, if asked to.
template <class T, bool kSum = false, class Team = Alone>
inline double write_all(const T* x, T* y, int64_t n, const Threshold<Acc<T>>& t, Team team = {}) {
  constexpr int kLanes = Accumulate<T>::kLanes;
  const auto write_block = [&](int64_t begin, int64_t end) {
    Vec<T> sum[2] = {};
    const auto probability = [&](Vec<T> v, int k) {
      const Vec<T> p = vmax(Vec<T>{}, t.excess(v));
      if constexpr (kSum) sum[k] += p;
      return p;
    };
    int64_t i = begin;
    for (; i + 2 * kLanes <= end; i += 2 * kLanes) {
      const Pair<Vec<T>> v = load2(x + i);
      store2(y + i, {probability(v.a, 0), probability(v.b, 1)});
    }
    for (; i + kLanes <= end; i += kLanes) store(y + i, probability(load(x + i), 0));
    if (i < end)
      store_part(y + i, end - i, probability(load_part(x + i, end - i, -std::numeric_limits<Acc<T>>::infinity()), 0));
    return kSum ? double(reduce_add(sum[0] + sum[1])) : 0;
  };
  return reduce_row(team, n, kSumBlock, 0.0, write_block, std::plus<>());
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
template <class T, class Team = Alone>
inline Excess excess_at(const T* x, int64_t n, Acc<T> max, double at, Team team = {}) {
  const Threshold<Acc<T>> t = threshold(max, at);
  const Acc<T> low = -std::numeric_limits<Acc<T>>::infinity();
  const auto of_block = [&](int64_t begin, int64_t end) {
    SumAbove<Vec<T>> above[4];
    // Σ (x - hi) - count · lo: one subtraction less for each.
    const auto add = [&](Vec<T> v, int k) {
      const Vec<T> d = v - t.hi;
      above[k].add(d, d <= t.lo);
    };
    const auto add_pair = [&](int k, int64_t, Pair<Vec<T>> v) { add(v.a, k), add(v.b, k + 1); };
    const int vectors = for_pairs<4>(end - begin, low, add_pair, x + begin);
    const SumAbove<Vec<T>> all = (above[0] + above[1]) + (above[2] + above[3]);
    const double count = double(reduce_add(__builtin_convertvector(all.count(vectors), Vec<T>)));
    return Excess{at, double(reduce_add(all.sum)) - count * double(t.lo), count};
  };
  return reduce_row(team, n, kSumBlock, Excess{at}, of_block,
                    [](const Excess& a, const Excess& b) { return Excess{a.at, a.f + b.f, a.count + b.count}; });
}

// Newton's steps from a lower bound, until they leave no more elements behind, or f - 1 is at most `tolerance`.
template <class T, class Team = Alone>
inline Excess newton(const T* x, int64_t n, Acc<T> max, double tau, double tolerance = 0, Team team = {}) {
  Excess e = excess_at(x, n, max, tau, team);
  for (double support = double(n) + 1; e.f - 1 > tolerance && e.count < support;) {
    support = e.count;
    e = excess_at(x, n, max, e.step(), team);
  }
  return e;
}

// Writes a row, given a lower bound of its threshold that mostly is the threshold. Whether it is shows in the sum of
// what is written; if not, further steps are taken.
template <class T, class Team = Alone>
inline void write_row(const T* x, T* y, int64_t n, Acc<T> max, double tau, Team team = {}) {
  for (double support = double(n) + 1;;) {
    const double sum = write_all<T, true>(x, y, n, threshold(max, tau), team);
    if (sum <= 1 + 4 * std::numeric_limits<Acc<T>>::epsilon()) break;
    const Excess e = newton(x, n, max, tau, kClose, team);
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
template <class T, class Team = Alone>
inline void flat_rows(FlatRow<T>* rows, int64_t count, int64_t n, Team team = {}) {
  Excess e[kFloats];
  for (int64_t i = 0; i < count; ++i) e[i] = excess_at(rows[i].x, n, rows[i].max, rows[i].tau, team);
  bool close = false;
  for (int pass = 1; pass < 8 && !close; ++pass) {  // over all rows, as each waits for its sums
    close = true;
    for (int64_t i = 0; i < count; ++i) {
      const double away = std::abs(e[i].f - 1);
      if (!(away > kClose)) continue;
      e[i] = excess_at(rows[i].x, n, rows[i].max, away > 0.02 ? e[i].guess() : e[i].step(), team);
      close = false;
    }
  }
  for (int64_t i = 0; i < count; ++i) write_row(rows[i].x, rows[i].y, n, rows[i].max, e[i].step(), team);
}
#endif
