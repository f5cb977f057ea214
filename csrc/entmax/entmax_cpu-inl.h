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

template <class A>
struct Threshold {
  A max, hi, lo;  // tau = max + hi + lo
  Threshold(A max, A hi, A lo) : max(max), hi(hi), lo(lo) {}
  Threshold(A max, double tau) : max(max), hi(A(tau)), lo(A(tau - double(hi))) {}
  template <class V>
  V excess(V x) const {  // x - tau
    return ((x - max) - hi) - lo;
  }
};

// Max of x[0, n), NaN aside, and Σ (x - base).
template <class T>
inline std::pair<Acc<T>, Acc<T>> max_and_sum(const T* x, int64_t n, Acc<T> base) {
  constexpr int kLanes = Accumulate<T>::kLanes;
  const Acc<T> low = -std::numeric_limits<Acc<T>>::infinity();
  Vec<T> max[2] = {splat<Vec<T>>(low), splat<Vec<T>>(low)}, sum[2] = {};
  const auto add = [&](Vec<T> v, int k) {
    max[k] = vmax(v, max[k]);
    sum[k] += v - base;
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
    sum[0] += load_part(x + i, n - i, base) - base;
  }
  return {reduce_max(vmax(max[0], max[1])), reduce_add(sum[0] + sum[1])};
}

// Elements of a row that may be in the support. Behind them there is room for a vector, and, in front, for the few of
// the rows before, which wait there for being solved together.
template <class A>
struct Candidates {
  std::unique_ptr<A[]> all_values;
  std::unique_ptr<uint32_t[]> all_indices;
  A* values;
  uint32_t* indices;
  int64_t count = 0;
  A max = -std::numeric_limits<A>::infinity();
  double tau = -1;     // relative to max; a lower bound of the row's, exact for the candidates after `shrink`
  explicit Candidates(int64_t n)
      : all_values(new A[n + kFew * (kFloats + 1)]), all_indices(new uint32_t[n + kFew * (kFloats + 1)]) {
    first_row();
  }
  void first_row() {
    values = all_values.get();
    indices = all_indices.get();
  }
  void next_row(int64_t room) {  // those of this row stay
    values += room;
    indices += room;
  }

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
      const Threshold<A> t(max, tau);
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

// Σ (x - bound)_+ and how many x are above.
template <class T>
inline std::pair<double, double> excess_over(const T* x, int64_t n, Acc<T> bound) {
  constexpr int kLanes = Accumulate<T>::kLanes;
  Vec<T> sum[2] = {};
  int64_t count = 0;
  const auto add = [&](Vec<T> v, int k) {
    v -= bound;
    sum[k] += vmax(Vec<T>{}, v);
    count += __builtin_popcount(mask_above(v, Acc<T>(0)));
  };
  int64_t i = 0;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
    const Pair<Vec<T>> v = load2(x + i);
    add(v.a, 0);
    add(v.b, 1);
  }
  for (; i < n; i += kLanes) add(i + kLanes <= n ? load(x + i) : load_part(x + i, n - i, bound), 0);
  return {double(reduce_add(sum[0] + sum[1])), double(count)};
}

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
  const auto [f, count] = excess_over(x, n, bound);
  return {double(bound) - double(max), f, count};
}

// The threshold of a row with most elements in the support: nothing is collected, and count is n. False where numbers
// are so large that nothing lies between max - 1 and max.
template <class T>
inline bool solve_flat(const T* x, int64_t n, Candidates<Acc<T>>& c) {
  double tau = c.tau;
  for (double support = double(n) + 1;;) {
    const Excess e = excess_at(x, n, c.max, tau);
    if (e.count == 0) return false;
    tau = e.step();
    if (e.count >= support) break;
    support = e.count;
  }
  c.tau = tau;
  c.count = n;
  return true;
}

// Fills in the candidates of a row and, unless they are few, their threshold.
template <class T>
inline void collect(const T* x, int64_t n, Candidates<Acc<T>>& c) {
  const int64_t first = std::min(kBlock, n);
  const Acc<T> base = load_one(x);
  const auto [max, sum] = max_and_sum(x, first, base);
  c.count = 0;
  c.max = max;
  c.tau = -1;
  // Newton's step from below all x leads to mean - 1/n. Where that is above max - 1, the row is flat, all would be
  // candidates, and it pays to guess: f is convex, and log f mostly concave, so that their tangents meet f = 1 before
  // and behind the threshold. Between them is a good point for another step.
  const double mean = (double(sum) - 1) / double(first) + (double(base) - double(max));
  const Excess e = mean > -1 ? excess_at(x, first, max, mean) : Excess{};
  if (e.count > 0) {
    const Excess g = excess_at(x, first, max, (e.step() + e.at + e.f * std::log(e.f) / e.count) / 2);
    c.tau = std::max({c.tau, e.step(), g.step()});
    if (n == first && 4 * g.count > double(n) && solve_flat(x, n, c)) return;
  }
  for (int64_t begin = 0, settled = 0; begin < n; begin += kBlock) {
    const int64_t end = std::min(begin + kBlock, n);
    const int64_t found = collect_above(x, begin, end, c.bound(), &c.values[c.count], &c.indices[c.count]);
    if (begin > 0 && found > 0) c.raise_max(block_max(&c.values[c.count], found));
    c.count += found;
    const bool last = end == n;
    if (last ? c.count > kFew : c.count > settled + settled / 2 + kFew / 2) {
      c.template shrink<Vec<T>>(/*once=*/!last);
      settled = c.count;
    }
  }
}

// y = max(x - tau, 0), and NaN where tau is.
template <class T>
inline void write_all(const T* x, T* y, int64_t n, const Threshold<Acc<T>>& t) {
  constexpr int kLanes = Accumulate<T>::kLanes;
  const auto probability = [&](Vec<T> v) { return vmax(Vec<T>{}, t.excess(v)); };
  int64_t i = 0;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
    const Pair<Vec<T>> v = load2(x + i);
    store2(y + i, {probability(v.a), probability(v.b)});
  }
  for (; i + kLanes <= n; i += kLanes) store(y + i, probability(load(x + i)));
  if (i < n) store_part(y + i, n - i, probability(load_part(x + i, n - i, Acc<T>(0))));
}

template <class T>
inline void write_row(const T* x, T* y, int64_t n, const Threshold<Acc<T>>& t, const Acc<T>* values,
                      const uint32_t* indices, int64_t count) {
  const bool sparse = count <= n / 4 && n > kShortRow && n <= std::numeric_limits<uint32_t>::max();
  if (!sparse || t.hi != t.hi) return write_all(x, y, n, t);
  std::fill_n(y, n, T{});
  for (int64_t j = 0; j < count; ++j) store_one(y + indices[j], std::max(t.excess(values[j]), Acc<T>(0)));
}

// As many rows as a vector has lanes, of up to kFew elements or candidates each.
template <class T>
struct RowGroup {
  using A = Acc<T>;
  using V = Vec<T>;
  static constexpr int kRows = Accumulate<T>::kLanes, kParts = 8;
  int64_t count[kRows] = {};  // 0: there is no such row, or it is done
  const A* values[kRows];     // of long rows: their candidates
  const uint32_t* indices[kRows];
  alignas(64) A max[kRows], tau[kRows], rest[kRows];  // of row i: tau + rest, relative to max

  Threshold<A> threshold(int64_t i) const { return {max[i], tau[i], rest[i]}; }

  // Newton's steps over n vectors (a multiple of 4) from t; returns the last step, which is not yet in t.
  static V newton(const V* z, int64_t n, V& t) {
    for (V support = splat<V>(A(n + 1));;) {
      V sum[4] = {}, count[4] = {};
      for (int64_t c = 0; c < n; c += 4) {
        for (int k = 0; k < 4; ++k) {
          const V p = z[c + k] - t;
          const auto below = p <= V{};  // NaN is not
          sum[k] = below ? sum[k] : sum[k] + p;
          count[k] = below ? count[k] : count[k] + A(1);
        }
      }
      const V active = (count[0] + count[1]) + (count[2] + count[3]);
      const V step = (((sum[0] + sum[1]) + (sum[2] + sum[3])) - A(1)) / vmax(active, splat<V>(1));
      const auto shrank = active < support;  // the others stay where they are, whatever their neighbours do
      if (reduce_add(shrank ? splat<V>(1) : V{}) == 0) return step;
      t = shrank ? t + step : t;
      support = active;
    }
  }

  // vector(i, c): elements of row i from c < count[i] on, -inf behind the last.
  template <class F>
  void solve(const F& vector) {
    const A low = -std::numeric_limits<A>::infinity();
    const int64_t most = *std::max_element(count, count + kRows);
    V z[kFew];
    int64_t n = 0;
    for (; n < most || n % kParts != 0; n += kRows) {
      for (int64_t i = 0; i < kRows; ++i) z[n + i] = n < count[i] ? vector(i, n) : splat<V>(low);
      transpose(z + n);
    }
    // The largest element of each of eight parts: their tau is a good lower bound, and costs a fraction of a step.
    V part[kParts];
    for (V& v : part) v = splat<V>(low);
    for (int64_t c = 0; c < n; c += kParts)
      for (int k = 0; k < kParts; ++k) part[k] = vmax(z[c + k], part[k]);
    V m = part[0];
    for (const V& v : part) m = vmax(v, m);
    m = m == splat<V>(low) ? V{} : m;  // of -inf alone p is zero
    for (V& v : part) v -= m;
    for (int64_t c = 0; c < n; ++c) z[c] -= m;
    V t = splat<V>(-1);
    t += newton(part, kParts, t);
    const V step = newton(z, n, t);
    store(max, m);
    store(tau, t);
    store(rest, step);
  }
};

// Rows x(i) to y(i).
template <class T, class X, class Y>
inline void sparsemax_rows(const X& x, const Y& y, int64_t begin, int64_t end, int64_t n, Candidates<Acc<T>>& c) {
  using A = Acc<T>;
  const A low = -std::numeric_limits<A>::infinity();
  RowGroup<T> g;
  for (int64_t row = begin; row < end; row += g.kRows) {
    const int64_t rows = std::min<int64_t>(g.kRows, end - row);
    std::fill(g.count + rows, g.count + g.kRows, 0);
    if (n <= kFew) {
      std::fill(g.count, g.count + rows, n);
      g.solve([&](int64_t i, int64_t j) {
        return j + g.kRows <= n ? load(x(row + i) + j) : load_part(x(row + i) + j, n - j, low);
      });
      for (int64_t i = 0; i < rows; ++i) write_all(x(row + i), y(row + i), n, g.threshold(i));
      continue;
    }
    c.first_row();
    for (int64_t i = 0; i < rows; ++i) {
      const T* from = x(row + i);
      collect(from, n, c);
      g.count[i] = c.count;
      if (c.count == 0 || c.count > kFew) {  // 0: -inf alone
        const Threshold<A> t = c.count == 0 ? Threshold<A>(A(0), 0.0) : Threshold<A>(c.max, c.tau);
        write_row(from, y(row + i), n, t, c.values, c.indices, c.count);
        g.count[i] = 0;
        continue;
      }
      store(&c.values[c.count], splat<Vec<T>>(low));
      g.values[i] = c.values;
      g.indices[i] = c.indices;
      c.next_row((c.count + g.kRows - 1) / g.kRows * g.kRows);
    }
    g.solve([&](int64_t i, int64_t j) { return load(g.values[i] + j); });
    for (int64_t i = 0; i < rows; ++i)
      if (g.count[i] > 0) write_row(x(row + i), y(row + i), n, g.threshold(i), g.values[i], g.indices[i], g.count[i]);
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
  const std::unique_ptr<T[]> tile(new T[kTileRows * n]);
  const auto row_of_tile = [&](int64_t i) { return &tile[i * n]; };
  for (int64_t row = begin; row < end;) {
    const int64_t count = std::min<int64_t>({kTileRows, end - row, p.rows.inner - row % p.rows.inner});
    gather(input + row_offset(p.rows, row), n, p.rows, count, tile.get());
    sparsemax_rows<T>(row_of_tile, row_of_tile, 0, count, n, candidates);
    scatter(tile.get(), n, p.output_rows, count, output + row_offset(p.output_rows, row));
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
