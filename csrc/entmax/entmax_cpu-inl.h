// Sparsemax rows on the CPU. [per ISA]
//
// p = max(x - tau, 0) with Σ p = 1 (Martins & Astudillo 2016). tau without sorting: Newton's (= Michelot's) step from
// below, tau ← tau + (Σ (x - tau)_+ - 1) / #{x > tau}, ends exactly when the support stops changing, and what a step
// leaves behind never comes back. tau of a part of the row is a lower bound for the row's (Condat 2016). So candidates
// are collected while the row is read, block by block against the threshold of what was read before; mostly they stay
// few, and the result is zeros with some elements set. From memory the row is read once and written once. Newton's
// steps wait for each other; where candidates are few they are taken for as many rows at once as a vector has lanes.
// All is relative to the largest element, and tau is held as the sum of two numbers: in a support of 10^5 elements of
// 10^-5 the rounding of tau alone would show in Σ p. NaN and +inf make the sum NaN, and so tau and the row.

constexpr int64_t kBlock = 1024;    // elements between two looks at the bound
constexpr int64_t kFew = 64;        // up to so many candidates, rows are solved together
constexpr int64_t kShortRow = 128;  // below, computing all of y is cheaper than setting elements of zeros

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

// Max of x[0, n), NaN aside, and the sum.
template <class T>
inline std::pair<Acc<T>, Acc<T>> max_and_sum(const T* x, int64_t n) {
  constexpr int kLanes = Accumulate<T>::kLanes;
  const Acc<T> low = -std::numeric_limits<Acc<T>>::infinity();
  Vec<T> max[2] = {splat<Vec<T>>(low), splat<Vec<T>>(low)}, sum[2] = {};
  const auto add = [&](Vec<T> v, int k) {
    max[k] = vmax(v, max[k]);
    sum[k] += v;
  };
  int64_t i = 0;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
    const Pair<Vec<T>> v = load2(x + i);
    add(v.a, 0);
    add(v.b, 1);
  }
  for (; i + kLanes <= n; i += kLanes) add(load(x + i), 0);
  if (i < n) {
    max[0] = vmax(load_part(x + i, n - i, low), max[0]);
    sum[0] += load_part(x + i, n - i, Acc<T>(0));
  }
  return {reduce_max(vmax(max[0], max[1])), reduce_add(sum[0] + sum[1])};
}

// Elements of a row that may be in the support. Behind them there is room for a vector.
template <class A>
struct Candidates {
  std::unique_ptr<A[]> values;
  std::unique_ptr<uint32_t[]> indices;
  int64_t count = 0;
  A max = -std::numeric_limits<A>::infinity();
  double tau = -1;  // relative to max; a lower bound of the row's, exact for the candidates after `shrink`
  explicit Candidates(int64_t n) : values(new A[n + kFloats]), indices(new uint32_t[n + kFloats]) {}

  void raise_max(A to) {
    if (to > max) tau = std::max(-1.0, tau + double(max) - double(to));
    max = std::max(max, to);
  }

  // Just below tau: rounding costs a candidate too many, not one too few.
  A bound() const {
    const A b = A(double(max) + tau);
    return b - std::abs(b) * std::numeric_limits<A>::epsilon();
  }

  // Newton's steps, each of which drops what it leaves behind; `once`: no more than one.
  template <class V>
  void shrink(bool once) {
    constexpr int64_t kLanes = sizeof(V) / sizeof(A);
    for (int64_t support = count + 1;;) {
      const Threshold<A> t = threshold(max, tau);
      store(&values[count], splat<V>(-std::numeric_limits<A>::infinity()));
      double total = 0;
      int64_t kept = 0;
      for (int64_t begin = 0; begin < count; begin += kBlock) {  // sums of a block in the type, of blocks in double
        V sum = {};
        for (int64_t i = begin; i < std::min(begin + kBlock, count); i += kLanes) {
          const V v = load(&values[i]), p = t.excess(v);
          sum += vmax(V{}, p);
          kept += append(mask_above(p, A(0)), v, load(&indices[i]), &values[kept], &indices[kept]);
        }
        total += double(reduce_add(sum));
      }
      tau += (total - 1) / double(kept);
      count = kept;
      if (kept >= support || once) return;
      support = kept;
    }
  }
};

// f(t) = Σ (x - t)_+ of x[0, n), n <= kBlock, at max + at, and where Newton's step for f = 1 leads from there: to a
// lower bound of the threshold, wherever it began; to -inf where nothing is above.
struct Excess {
  double at, f, count;
  double step() const { return at + (f - 1) / count; }
};
template <class T>
inline Excess excess_at(const T* x, int64_t n, Acc<T> max, double at) {
  using A = Acc<T>;
  A bound = A(double(max) + at);  // rounded down: nothing between it and max + at is missed
  if (double(bound) > double(max) + at) bound = std::nextafter(bound, -std::numeric_limits<A>::infinity());
  constexpr int kLanes = Accumulate<T>::kLanes;
  using Count = decltype(Vec<T>{} > Vec<T>{});
  Vec<T> sum[2] = {};
  Count count[2] = {};
  const auto add = [&](Vec<T> v, int k) {
    const Vec<T> p = v - bound;
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
  for (; i < n; i += kLanes) add(i + kLanes <= n ? load(x + i) : load_part(x + i, n - i, bound), 0);
  const Vec<T> above = __builtin_convertvector(count[0] + count[1], Vec<T>);
  return {double(bound) - double(max), double(reduce_add(sum[0] + sum[1])), double(reduce_add(above))};
}

// A lower bound of tau for x[0, n), n <= kBlock, relative to the largest element.
template <class T>
inline double guess(const T* x, int64_t n, Acc<T> max, Acc<T> sum) {
  // Newton's step from below all x leads to mean - 1/n. Where that is above max - 1, the row is flat, all would be
  // candidates, and it pays to guess: f is convex, and log f mostly concave, so that their tangents meet f = 1 before
  // and behind the threshold. Between them is a good point for another step.
  const double mean = (double(sum) - 1) / double(n) - double(max);
  const Excess e = mean > -1 ? excess_at(x, n, max, mean) : Excess{};
  if (e.count == 0) return -1;  // nothing lies between max - 1 and max where numbers are that large
  const Excess g = excess_at(x, n, max, (e.step() + e.at + e.f * std::log(e.f) / e.count) / 2);
  return std::max({-1.0, e.step(), g.step()});
}

// Fills in the candidates of a row, and tau.
template <class T>
inline void collect(const T* x, int64_t n, Candidates<Acc<T>>& c) {
  const int64_t first = std::min(kBlock, n);
  const auto [max, sum] = max_and_sum(x, first);
  c.max = max;
  c.tau = guess(x, first, max, sum);
  c.count = 0;
  for (int64_t begin = 0, settled = 0; begin < n; begin += kBlock) {
    const int64_t end = std::min(begin + kBlock, n);
    const int64_t found = collect_above(x, begin, end, c.bound(), &c.values[c.count], &c.indices[c.count]);
    if (begin > 0 && found > 0) c.raise_max(block_max(&c.values[c.count], found));
    c.count += found;
    const bool last = end == n;
    if (last ? c.count > 0 : c.count > settled + settled / 2 + kFew / 2) {
      c.template shrink<Vec<T>>(/*once=*/!last);
      settled = c.count;
    }
  }
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
  if (i < n) store_part(y + i, n - i, probability(load_part(x + i, n - i, -std::numeric_limits<Acc<T>>::infinity()), 0));
  return kSum ? reduce_add(sum[0] + sum[1]) : Acc<T>(0);
}

template <class T>
inline void write(const T* x, T* y, int64_t n, const Candidates<Acc<T>>& c) {
  const Threshold<Acc<T>> t = c.count == 0 ? Threshold<Acc<T>>{0, 0} : threshold(c.max, c.tau);  // 0: -inf alone
  const bool sparse = c.count <= n / 4 && n <= std::numeric_limits<uint32_t>::max();
  if (!sparse || t.hi != t.hi) {
    write_all(x, y, n, t);
    return;
  }
  std::fill_n(y, n, T{});
  for (int64_t j = 0; j < c.count; ++j) store_one(y + c.indices[j], std::max(t.excess(c.values[j]), Acc<T>(0)));
}

// ---- short rows ---------------------------------------------------------------------------------------------------

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
  // Of each row the largest element, tau relative to it, and how many are above.
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
    for (int64_t c = 0; c < n; ++c) z[c] -= m;
    for (Count support = Count{} + int(n + 1);;) {
      V sum[4] = {};
      Count count[4] = {};
      for (int64_t c = 0; c < n; c += 4) {
        for (int k = 0; k < 4; ++k) {
          const V p = z[c + k] - t;
          const auto below = p <= V{};  // NaN is not
          sum[k] = below ? sum[k] : sum[k] + p;
          count[k] = below ? count[k] : count[k] + 1;
        }
      }
      const Count above = (count[0] + count[1]) + (count[2] + count[3]);
      const V divisor = vmax(__builtin_convertvector(above, V), splat<V>(1));
      step = (((sum[0] + sum[1]) + (sum[2] + sum[3])) - A(1)) / divisor;
      const auto shrank = above < support;  // the others stay where they are, whatever their neighbours do
      if (reduce_add(shrank ? splat<V>(1) : V{}) == 0) {
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

// The two largest elements of each of sixteen parts.
constexpr int64_t kPairs = 16;
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
    add(load_part(x + i, std::min<int64_t>(kLanes, n - i), low), splat<V>(low), 0);
  }
  for (int k = 0; k < kVectors; ++k) {
    store(to + k * kLanes, first[k]);
    store(to + kPairs + k * kLanes, second[k]);
  }
}

// Rows x(i) to y(i), elsewhere.
template <class T, class X, class Y>
inline void sparsemax_rows(const X& x, const Y& y, int64_t begin, int64_t end, int64_t n, Candidates<Acc<T>>& c) {
  using A = Acc<T>;
  if (n > kBlock) {
    for (int64_t row = begin; row < end; ++row) {
      collect(x(row), n, c);
      write(x(row), y(row), n, c);
    }
    return;
  }
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
    for (int64_t i = 0; i < rows; ++i) {
      double tau = g.tau[i];
      if (g.active[i] > A(kPairs)) {  // most likely there are more
        tau = std::max(tau, guess(from[i], n, g.max[i], max_and_sum(from[i], n).second));
        tau = std::max(tau, excess_at(from[i], n, g.max[i], tau).step());
      }
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

// grad_input = g - mean of g over the support on the support, 0 elsewhere; NaN where p is NaN. Where the support is
// small, p is read once, g only there, and zeros are written; else p and g are read twice, the second time from cache.
template <class T>
inline void sparsemax_bwd_row(const T* p, const T* g, T* out, int64_t n, Candidates<Acc<T>>& c) {
  using A = Acc<T>;
  constexpr int kLanes = Accumulate<T>::kLanes;
  double total = 0;
  int64_t support = 0, begin = 0;
  bool has_nan = false;
  if (n > kBlock && n <= std::numeric_limits<uint32_t>::max()) {
    for (; begin < n && support <= begin / 4 && !has_nan; begin += kBlock) {
      const int64_t end = std::min(begin + kBlock, n);
      const int64_t found = collect_above(p, begin, end, A(0), &c.values[support], &c.indices[support]);
      for (int64_t j = support; j < support + found; ++j) {
        has_nan |= c.values[j] != c.values[j];
        c.values[j] = load_one(g + c.indices[j]);
        total += double(c.values[j]);
      }
      support += found;
    }
    if (begin >= n && !has_nan) {
      const A mean = A(total / double(support));
      std::fill_n(out, n, T{});
      for (int64_t j = 0; j < support; ++j) store_one(out + c.indices[j], c.values[j] - mean);
      return;
    }
  }
  total = 0;
  support = 0;
  for (begin = 0; begin < n; begin += kBlock) {  // sums of a block in the type, of blocks in double
    const int64_t end = std::min(begin + kBlock, n);
    Vec<T> sum = {};
    int64_t i = begin;
    const auto add = [&](Vec<T> pv, Vec<T> gv) {
      sum += pv <= Vec<T>{} ? Vec<T>{} : gv + (pv - pv);  // NaN in p makes the mean NaN
      support += __builtin_popcount(mask_above(pv, A(0)));
    };
    for (; i + kLanes <= end; i += kLanes) add(load(p + i), load(g + i));
    if (i < end) add(load_part(p + i, end - i, A(0)), load_part(g + i, end - i, A(0)));
    total += double(reduce_add(sum));
  }
  const A mean = A(total / double(support));
  const auto value = [mean](Vec<T> pv, Vec<T> gv) { return pv <= Vec<T>{} ? Vec<T>{} : gv - mean; };
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(out + i, value(load(p + i), load(g + i)));
  if (i < n) store_part(out + i, n - i, value(load_part(p + i, n - i, A(0)), load_part(g + i, n - i, A(0))));
}

// ---- rows ---------------------------------------------------------------------------------------------------------

// Neighbouring rows whose elements are not: they are gathered into, and scattered from, contiguous scratch, several at
// a time so that each cache line is used whole.
constexpr int64_t kTileRows = 16;

template <class T>
inline void gather(const T* x, int64_t n, const Rows& rows, int64_t count, T* tile) {
  for (int64_t c = 0; c < n; ++c)
    for (int64_t i = 0; i < count; ++i) tile[i * n + c] = x[c * rows.stride_n + i * rows.stride_inner];
}
template <class T>
inline void scatter(const T* tile, int64_t n, const Rows& rows, int64_t count, T* y) {
  for (int64_t c = 0; c < n; ++c)
    for (int64_t i = 0; i < count; ++i) y[c * rows.stride_n + i * rows.stride_inner] = tile[i * n + c];
}

template <class T>
void fwd_rows(const EntmaxParams& p, int64_t begin, int64_t end) {
  const T* input = static_cast<const T*>(p.input);
  T* output = static_cast<T*>(p.output);
  const int64_t n = p.rows.n;
  Candidates<Acc<T>> candidates(n);
  if (p.rows.stride_n == 1 && p.output_rows.stride_n == 1) {
    const auto x = [&](int64_t row) { return input + row_offset(p.rows, row); };
    const auto y = [&](int64_t row) { return output + row_offset(p.output_rows, row); };
    return sparsemax_rows<T>(x, y, begin, end, n, candidates);
  }
  const std::unique_ptr<T[]> from(new T[kTileRows * n]), to(new T[kTileRows * n]);
  for (int64_t row = begin; row < end;) {
    const int64_t count = std::min<int64_t>({kTileRows, end - row, p.rows.inner - row % p.rows.inner});
    gather(input + row_offset(p.rows, row), n, p.rows, count, from.get());
    sparsemax_rows<T>([&](int64_t i) { return &from[i * n]; }, [&](int64_t i) { return &to[i * n]; }, 0, count, n,
                      candidates);
    scatter(to.get(), n, p.output_rows, count, output + row_offset(p.output_rows, row));
    row += count;
  }
}

template <class T>
void bwd_rows(const EntmaxParams& p, int64_t begin, int64_t end) {
  const T* output = static_cast<const T*>(p.output);
  const T* grad_output = static_cast<const T*>(p.grad_output);
  T* grad_input = static_cast<T*>(p.grad_input);
  const int64_t n = p.output_rows.n;
  Candidates<Acc<T>> candidates(n);
  if (p.output_rows.stride_n == 1 && p.grad_output_rows.stride_n == 1 && p.grad_input_rows.stride_n == 1) {
    for (int64_t row = begin; row < end; ++row)
      sparsemax_bwd_row(output + row_offset(p.output_rows, row), grad_output + row_offset(p.grad_output_rows, row),
                        grad_input + row_offset(p.grad_input_rows, row), n, candidates);
    return;
  }
  const std::unique_ptr<T[]> probabilities(new T[kTileRows * n]), gradients(new T[kTileRows * n]);
  for (int64_t row = begin; row < end;) {
    const int64_t count = std::min<int64_t>({kTileRows, end - row, p.output_rows.inner - row % p.output_rows.inner});
    gather(output + row_offset(p.output_rows, row), n, p.output_rows, count, probabilities.get());
    gather(grad_output + row_offset(p.grad_output_rows, row), n, p.grad_output_rows, count, gradients.get());
    for (int64_t i = 0; i < count; ++i)
      sparsemax_bwd_row(&probabilities[i * n], &gradients[i * n], &gradients[i * n], n, candidates);
    scatter(gradients.get(), n, p.grad_input_rows, count, grad_input + row_offset(p.grad_input_rows, row));
    row += count;
  }
}

void sparsemax_fwd_rows(const EntmaxParams& p, int64_t begin, int64_t end) { TSE_EACH_DTYPE(fwd_rows, p, begin, end) }
void sparsemax_bwd_rows(const EntmaxParams& p, int64_t begin, int64_t end) { TSE_EACH_DTYPE(bwd_rows, p, begin, end) }
