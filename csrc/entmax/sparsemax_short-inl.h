// Sparsemax of rows of up to kBlock elements, and what longer rows share with them. [per ISA]
//
// Newton's steps wait for each other; so they are taken for as many rows at once as a vector has lanes, on a few
// elements of each: all of up to kFew, else the two largest of each of sixteen parts. tau of a part of the row is a
// lower bound for the row's (Condat 2016), and mostly no part has more than two in the support. Whether that was so
// shows in the sum of what is written; if not, the row takes further steps.

constexpr int64_t kBlock = 1024;  // elements whose sums are taken in the type; and between two looks at the bound
constexpr int64_t kFew = 64;      // elements of each row that a group of rows has room for
constexpr int64_t kPairs = 16;

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
template <class T, bool kSum = false>
inline Acc<T> write_all(const T* x, T* y, int64_t n, const Threshold<Acc<T>>& t) {
  constexpr int kLanes = Accumulate<T>::kLanes;
  Vec<T> sum[2] = {};
  const auto probability = [&](Vec<T> v, int k) {
    const Vec<T> p = vmax(Vec<T>{}, t.excess(v));
    if constexpr (kSum) sum[k] += p;
    return p;
  };
  int64_t i = 0;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
    const Pair<Vec<T>> v = load2(x + i);
    store2(y + i, {probability(v.a, 0), probability(v.b, 1)});
  }
  for (; i + kLanes <= n; i += kLanes) store(y + i, probability(load(x + i), 0));
  if (i < n)
    store_part(y + i, n - i, probability(load_part(x + i, n - i, -std::numeric_limits<Acc<T>>::infinity()), 0));
  return kSum ? reduce_add(sum[0] + sum[1]) : Acc<T>(0);
}

template <class T>
inline double sum_of(const T* x, int64_t n) {
  constexpr int kLanes = Accumulate<T>::kLanes;
  Vec<T> sum[2] = {};
  int64_t i = 0;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
    const Pair<Vec<T>> v = load2(x + i);
    sum[0] += v.a;
    sum[1] += v.b;
  }
  for (; i < n; i += kLanes) sum[0] += load_part(x + i, std::min<int64_t>(kLanes, n - i), Acc<T>(0));
  return double(reduce_add(sum[0] + sum[1]));
}

// f(t) = Σ (x - t)_+ of x[0, n), n <= kBlock, at max + at, and where Newton's step for f = 1 leads from there: to a
// lower bound of the threshold, wherever it began.
struct Excess {
  double at = 0, f = 0, count = 0;  // how many x are above t
  double step() const { return at + (f - 1) / count; }
};
template <class T>
inline Excess excess_at(const T* x, int64_t n, Acc<T> max, double at) {
  constexpr int kLanes = Accumulate<T>::kLanes;
  using Count = decltype(Vec<T>{} > Vec<T>{});
  const Threshold<Acc<T>> t = threshold(max, at);
  Vec<T> sum[2] = {};
  Count count[2] = {};
  const auto add = [&](Vec<T> v, int k) {
    const Vec<T> p = t.excess(v);
    const auto below = p <= Vec<T>{};
    sum[k] = below ? sum[k] : sum[k] + p;
    count[k] = below ? count[k] : count[k] + 1;
  };
  int64_t i = 0;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
    const Pair<Vec<T>> v = load2(x + i);
    add(v.a, 0);
    add(v.b, 1);
  }
  const Acc<T> low = -std::numeric_limits<Acc<T>>::infinity();
  for (; i < n; i += kLanes) add(i + kLanes <= n ? load(x + i) : load_part(x + i, n - i, low), 0);
  const Vec<T> above = __builtin_convertvector(count[0] + count[1], Vec<T>);
  return {at, double(reduce_add(sum[0] + sum[1])), double(reduce_add(above))};
}

// A row of n <= kBlock elements, its largest element, and a lower bound of tau relative to it.
template <class T>
struct Guess {
  const T* x;
  Acc<T> max;
  double tau = -1;
};
// Raises tau where the row is flat: Newton's step from below all x leads to mean - 1/n; where that is above max - 1,
// all would be candidates. f is convex, and log f mostly concave, so that their tangents meet f = 1 before and behind
// the threshold; between them is a good point for another step. Pass by pass over all rows, as each waits for its sums.
template <class T>
inline void raise_flat(Guess<T>* rows, int64_t count, int64_t n) {
  Excess e[kFloats];
  for (int64_t i = 0; i < count; ++i) e[i].at = (sum_of(rows[i].x, n) - 1) / double(n) - double(rows[i].max);
  for (int64_t i = 0; i < count; ++i)  // of numbers so large that the sum is lost, nothing may be above
    e[i] = e[i].at > -1 ? excess_at(rows[i].x, n, rows[i].max, e[i].at) : Excess{};
  for (int64_t i = 0; i < count; ++i) {
    if (e[i].count == 0) continue;
    const double between = (e[i].step() + e[i].at + e[i].f * std::log(e[i].f) / e[i].count) / 2;
    rows[i].tau = std::max({rows[i].tau, e[i].step(), excess_at(rows[i].x, n, rows[i].max, between).step()});
  }
}

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
  // Of each row the largest element, tau relative to it, and how many of those looked at are above, at least 1.
  alignas(64) A max[kRows], active[kRows];
  double tau[kRows];

  // Sorts v. The threshold is that of the k largest for one k, and of others it is a lower bound, so that it is the
  // largest of all; relative to the largest element, which is v[0] after.
  template <int n>
  static V tau_of(V* v) {
    sort_lanes<0, n>(v);
    V sum = {}, tau = splat<V>(-1);
    for (int k = 1; k < n; ++k) {
      sum += v[k] - v[0];
      tau = vmax((sum - A(1)) * A(1.0 / (k + 1)), tau);
    }
    return tau;
  }

  // vector(i, c): elements of row i from c on, -inf behind the last.
  template <class F>
  void solve(int64_t columns, const F& vector) {
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
    V t = tau_of<kParts>(part), step;
    const V m = part[0] == low ? V{} : part[0];  // of -inf alone p is zero
    bool first = true;
    for (Count support = Count{} + int(n + 1);;) {
      V sum[4] = {};
      Count count[4] = {};
      for (int64_t c = 0; c < n; c += 4) {
        for (int k = 0; k < 4; ++k) {
          if (first) z[c + k] -= m;
          const V p = z[c + k] - t;
          const auto below = p <= V{};  // NaN is not
          sum[k] = below ? sum[k] : sum[k] + p;
          count[k] = below ? count[k] : count[k] + 1;
        }
      }
      first = false;
      const Count above = (count[0] + count[1]) + (count[2] + count[3]);
      const V divisor = vmax(__builtin_convertvector(above, V), splat<V>(1));
      step = (((sum[0] + sum[1]) + (sum[2] + sum[3])) - A(1)) / divisor;
      const auto shrank = above < support;  // the others stay where they are, whatever their neighbours do
      if (mask_above(shrank ? splat<V>(1) : V{}, A(0)) == 0) {
        store(active, divisor);
        break;
      }
      t = shrank ? t + step : t;
      support = above;
    }
    store(max, m);
    for (int i = 0; i < kRows; ++i) tau[i] = double(t[i]) + double(step[i]);
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
  for (; i < n; i += kLanes) add(load_part(x + i, std::min<int64_t>(kLanes, n - i), low), splat<V>(low), 0);
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
      g.solve(n, [&](int64_t i, int64_t j) {
        return j + g.kRows <= n ? load(from[i] + j) : load_part(from[i] + j, n - j, low);
      });
      for (int64_t i = 0; i < rows; ++i) write_all(from[i], y(row + i), n, threshold(g.max[i], g.tau[i]));
      continue;
    }
    for (int64_t i = 0; i < rows; ++i) two_of_each(from[i], n, largest[i]);
    g.solve(2 * kPairs, [&](int64_t i, int64_t j) { return load(largest[i] + j); });
    // Where more than half are above, there are most likely others, too.
    Guess<T> flat[g.kRows];
    int64_t flats = 0;
    for (int64_t i = 0; i < rows; ++i)
      if (g.active[i] > A(kPairs)) flat[flats++] = {from[i], g.max[i], g.tau[i]};
    raise_flat(flat, flats, n);
    for (int64_t k = 0; k < flats; ++k) {  // down again, too, if rounding has led too far: f may have been large
      const Excess e = excess_at(flat[k].x, n, flat[k].max, flat[k].tau);
      if (e.count > 0) flat[k].tau = e.step();
    }
    for (int64_t i = 0, k = 0; i < rows; ++i) {
      double tau = g.active[i] > A(kPairs) ? flat[k++].tau : g.tau[i];
      for (double support = double(n) + 1;;) {
        const A sum = write_all<T, true>(from[i], y(row + i), n, threshold(g.max[i], tau));
        if (sum <= 1 + 4 * std::numeric_limits<A>::epsilon()) break;
        const Excess e = excess_at(from[i], n, g.max[i], tau);
        if (e.count >= support) break;
        tau = e.step();
        support = e.count;
      }
    }
  }
}
