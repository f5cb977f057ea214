// Sparsemax rows on the CPU. [per ISA]
//
// p = max(x - tau, 0) with Σ p = 1 (Martins & Astudillo 2016). tau without sorting: Newton's (= Michelot's) step from
// below, tau ← tau + (Σ (x - tau)_+ - 1) / #{x > tau}, ends exactly when the support stops changing, and what a step
// leaves behind never comes back. tau of a part of the row is a lower bound for the row's (Condat 2016). So candidates
// are collected while the row is read, block by block against the threshold of what was read before; mostly they stay
// few, and the result is zeros with some elements set. A short row is its own list of candidates. From memory the row
// is read once and written once. All is relative to the largest element, and tau is held as the sum of two numbers: in
// a support of 10^5 elements of 10^-5 the rounding of tau alone would show in Σ p.

constexpr int64_t kBlock = 1024;    // elements between two steps of the bound
constexpr int64_t kShortRow = 128;  // collecting candidates pays above

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

// The largest element, and NaN if there is one.
template <class T>
inline Acc<T> max_or_nan(const T* x, int64_t n) {
  using A = Acc<T>;
  constexpr int kLanes = Accumulate<T>::kLanes;
  const A low = -std::numeric_limits<A>::infinity();
  Vec<T> m0 = splat<Vec<T>>(low), m1 = m0, nan = {};
  int64_t i = 0;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
    const Pair<Vec<T>> v = load2(x + i);
    m0 = vmax(v.a, m0);
    m1 = vmax(v.b, m1);
    nan += v.a != v.a || v.b != v.b ? splat<Vec<T>>(A(1)) : Vec<T>{};
  }
  for (; i < n; i += kLanes) {
    const Vec<T> v = i + kLanes <= n ? load(x + i) : load_part(x + i, n - i, low);
    m0 = vmax(v, m0);
    nan += v != v ? splat<Vec<T>>(A(1)) : Vec<T>{};
  }
  return reduce_add(nan) > 0 ? std::numeric_limits<A>::quiet_NaN() : reduce_max(vmax(m0, m1));
}

// Elements that may be in the support, with a whole vector's room behind them.
template <class A>
struct Candidates {
  std::unique_ptr<A[]> values;
  std::unique_ptr<uint32_t[]> indices;
  int64_t count = 0;
  A max = -std::numeric_limits<A>::infinity();
  double tau = -1;     // relative to max; a lower bound of the row's, exact for the candidates after `shrink`
  explicit Candidates(int64_t n) : values(new A[n + kFloats]), indices(new uint32_t[n + kFloats]) {}

  void raise_max(A to) {
    if (to > max) tau = std::max(-1.0, tau + double(max) - double(to));
    max = to;
  }

  // Newton's steps, each of which drops what it leaves behind.
  template <class V>
  void shrink() {
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
          sum += vmax(p, V{});
          kept += append_above(p, A(0), v, &indices[i], &values[kept], &indices[kept]);
        }
        total += double(reduce_add(sum));
      }
      tau += (total - 1) / double(kept);
      count = kept;
      if (kept >= support) return;
      support = kept;
    }
  }
};

// Fills in the candidates of a row and their threshold; false where the row has NaN or +inf, or only -inf, and `max`
// says which. The first elements are searched for their maximum. Later ones are only compared with a bound just below
// tau, which costs nothing but a candidate too many, and lets NaN through to where it is seen.
template <class T>
inline bool collect(const T* x, int64_t n, Candidates<Acc<T>>& c) {
  using A = Acc<T>;
  const A low = -std::numeric_limits<A>::infinity();
  c.count = 0;
  c.max = max_or_nan(x, std::min(kBlock, n));
  c.tau = -1;
  for (int64_t begin = 0, end = std::min(kBlock, n); begin < n; begin = end, end = std::min(end + kBlock, n)) {
    if (!(c.max < -low)) return false;
    const A bound = c.max == low ? low : std::nextafter(A(double(c.max) + c.tau), low);
    const int64_t found = collect_above(x, begin, end, bound, &c.values[c.count], &c.indices[c.count]);
    A max = c.max;
    for (int64_t j = c.count; j < c.count + found; ++j)
      max = c.values[j] <= max ? max : c.values[j] > max ? c.values[j] : std::numeric_limits<A>::quiet_NaN();
    c.count += found;
    if (!(max < -low)) c.max = max;
    else if (found != 0) {
      c.raise_max(max);
      c.template shrink<Vec<T>>();
    }
  }
  return std::isfinite(c.max);
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

// Rows of up to kShortRow elements, x(i) to y(i) for i < count, as many at a time as a vector has lanes: a lane has a
// row, and Newton's steps, which would wait for each other in one row, are taken for all of them at once.
template <class T, class X, class Y>
inline void sparsemax_short_rows(const X& x, const Y& y, int64_t count, int64_t n) {
  using A = Acc<T>;
  using V = Vec<T>;
  constexpr int kLanes = Accumulate<T>::kLanes;
  const A low = -std::numeric_limits<A>::infinity();
  V z[kShortRow];
  alignas(64) A max_of[kLanes], tau_of[kLanes], rest_of[kLanes];
  for (int64_t row = 0; row < count; row += kLanes) {
    const int64_t lanes = std::min<int64_t>(kLanes, count - row);
    V max = splat<V>(low);
    for (int64_t c = 0; c < n; c += kLanes) {
      for (int64_t i = 0; i < kLanes; ++i) {
        const T* from = x(row + std::min(i, lanes - 1)) + c;
        z[c + i] = c + kLanes <= n ? load(from) : load_part(from, n - c, low);
      }
      transpose(z + c);
      for (int64_t i = 0; i < kLanes; ++i) max = vmax(z[c + i], max);  // NaN aside
    }
    max = max == splat<V>(low) ? V{} : max;  // -inf alone: p is zero
    V total = {};
    for (int64_t c = 0; c < n; ++c) total += z[c] -= max;  // what pads the last four stays -inf
    V tau = vmax((total - A(1)) / A(n), splat<V>(-1)), rest, support = splat<V>(A(n + 1));  // relative to max
    for (bool open = true; open;) {
      V sum[4] = {}, count[4] = {};
      for (int64_t c = 0; c < n; c += 4) {
        for (int k = 0; k < 4; ++k) {
          const V p = z[c + k] - tau;
          sum[k] += vmax(V{}, p);  // NaN and infinity make it NaN, and so the row
          count[k] += p > V{} ? splat<V>(1) : V{};
        }
      }
      const V active = (count[0] + count[1]) + (count[2] + count[3]);
      rest = (((sum[0] + sum[1]) + (sum[2] + sum[3])) - A(1)) / vmax(active, splat<V>(1));
      const auto shrank = active < support;  // the others stay where they are, whatever their neighbours do
      tau = shrank ? tau + rest : tau;
      support = active;
      open = reduce_add(shrank ? splat<V>(1) : V{}) > 0;
    }
    store(max_of, max);
    store(tau_of, tau);
    store(rest_of, rest);
    for (int64_t i = 0; i < lanes; ++i)
      write_all(x(row + i), y(row + i), n, Threshold<A>(max_of[i], tau_of[i], rest_of[i]));
  }
}

template <class T>
inline void sparsemax_row(const T* x, T* y, int64_t n, Candidates<Acc<T>>& c) {
  using A = Acc<T>;
  const A low = -std::numeric_limits<A>::infinity();
  if (!collect(x, n, c)) {  // NaN and +inf make the row NaN, -inf alone makes it zero
    T fill;
    store_one(&fill, c.max == low ? A(0) : std::numeric_limits<A>::quiet_NaN());
    std::fill_n(y, n, fill);
  } else if (c.count > n / 4 || n > std::numeric_limits<uint32_t>::max()) {
    write_all(x, y, n, Threshold<A>(c.max, c.tau));
  } else {
    const Threshold<A> t(c.max, c.tau);
    std::fill_n(y, n, T{});
    for (int64_t j = 0; j < c.count; ++j) {
      const A p = t.excess(c.values[j]);
      if (p > 0) store_one(y + c.indices[j], p);
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
  support = n;
  for (begin = 0; begin < n; begin += kBlock) {
    const int64_t end = std::min(begin + kBlock, n);
    Vec<T> sum = {}, zeros = {};  // a block's zeros can be counted in the type
    int64_t i = begin;
    const auto add = [&](Vec<T> pv, Vec<T> gv) {
      const auto is_zero = pv <= Vec<T>{};
      sum += is_zero ? Vec<T>{} : gv;
      zeros += is_zero ? splat<Vec<T>>(A(1)) : Vec<T>{};
    };
    for (; i + kLanes <= end; i += kLanes) add(load(p + i), load(g + i));
    if (i < end) {
      add(load_part(p + i, end - i, A(0)), load_part(g + i, end - i, A(0)));
      support += kLanes - (end - i);
    }
    total += double(reduce_add(sum));
    support -= int64_t(reduce_add(zeros));
  }
  const A mean = A(total / double(support));
  const auto value = [mean](Vec<T> pv, Vec<T> gv) { return pv <= Vec<T>{} ? Vec<T>{} : (gv - mean) + (pv - pv); };
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

// Rows x(i) to y(i), i < count.
template <class T, class X, class Y>
inline void sparsemax_rows(const X& x, const Y& y, int64_t count, int64_t n, Candidates<Acc<T>>& candidates) {
  if (n <= kShortRow) return sparsemax_short_rows<T>(x, y, count, n);
  for (int64_t i = 0; i < count; ++i) sparsemax_row<T>(x(i), y(i), n, candidates);
}

template <class T>
void fwd_rows(const EntmaxParams& p, int64_t begin, int64_t end) {
  const T* input = static_cast<const T*>(p.input);
  T* output = static_cast<T*>(p.output);
  const int64_t n = p.rows.n;
  Candidates<Acc<T>> candidates(n);
  if (p.rows.stride_n == 1 && p.output_rows.stride_n == 1) {
    return sparsemax_rows<T>([&](int64_t i) { return input + row_offset(p.rows, begin + i); },
                             [&](int64_t i) { return output + row_offset(p.output_rows, begin + i); }, end - begin, n,
                             candidates);
  }
  const std::unique_ptr<T[]> tile(new T[kTileRows * n]);
  const auto row_of_tile = [&](int64_t i) { return &tile[i * n]; };
  for (int64_t row = begin; row < end;) {
    const int64_t count = std::min<int64_t>({kTileRows, end - row, p.rows.inner - row % p.rows.inner});
    gather(input + row_offset(p.rows, row), n, p.rows, count, tile.get());
    sparsemax_rows<T>(row_of_tile, row_of_tile, count, n, candidates);
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
