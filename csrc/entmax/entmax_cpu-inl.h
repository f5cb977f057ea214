// Sparsemax rows on the CPU. [per ISA]
//
// p = max(x - tau, 0) with Σ p = 1 (Martins & Astudillo 2016). tau without sorting: Newton's (= Michelot's) step from
// below, tau ← tau + (Σ (x - tau)_+ - 1) / #{x > tau}, ends exactly when the support stops changing. Only elements
// above max - 1 can be in the support. Mostly these candidates are few: they are collected while the row is read, block
// by block against the maximum so far, and the result is zeros with some elements set. Where they are many, or the row
// is short, the row itself takes their place. From memory the row is read once and written once. All is relative to the
// row's maximum, and tau is held as the sum of two numbers: in a support of 10^5 elements of 10^-5 the rounding of tau
// alone would show in Σ p.

constexpr int64_t kBlock = 4096;    // what stays in L1 between maximum and candidates
constexpr int64_t kShortRow = 512;  // collecting candidates pays above

template <class A>
struct Threshold {
  A hi, lo;
  explicit Threshold(double tau) : hi(A(tau)), lo(A(tau - double(hi))) {}
};

// The largest element, and NaN if there is one.
template <class T>
inline Acc<T> max_or_nan(const T* x, int64_t n) {
  using A = Acc<T>;
  constexpr int kLanes = Accumulate<T>::kLanes;
  const A low = -std::numeric_limits<A>::infinity();
  Vec<T> m0 = splat<Vec<T>>(low), m1 = m0;
  auto nan = m0 != m0;
  int64_t i = 0;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
    const Pair<Vec<T>> v = load2(x + i);
    m0 = vmax(v.a, m0);
    m1 = vmax(v.b, m1);
    nan |= (v.a != v.a) | (v.b != v.b);
  }
  for (; i < n; i += kLanes) {
    const Vec<T> v = i + kLanes <= n ? load(x + i) : load_part(x + i, n - i, low);
    m0 = vmax(v, m0);
    nan |= v != v;
  }
  return reduce_add(nan) != 0 ? std::numeric_limits<A>::quiet_NaN() : reduce_max(vmax(m0, m1));
}

// tau relative to `max` for the elements x, of which those at or below max - 1 have no say.
template <class T>
inline Threshold<Acc<T>> find_threshold(const T* x, int64_t n, Acc<T> max) {
  using A = Acc<T>;
  constexpr int kLanes = Accumulate<T>::kLanes;
  const A low = -std::numeric_limits<A>::infinity();
  double tau = -1;
  for (int64_t support = n + 1;;) {
    const Threshold<A> t(tau);
    double total = 0;
    int64_t active = 0;
    for (int64_t begin = 0; begin < n; begin += kBlock) {  // sums of a block in the type, of blocks in double
      const int64_t end = std::min(begin + kBlock, n);
      Vec<T> sum = {};
      auto above = sum > sum;  // counts downwards: true is -1
      for (int64_t i = begin; i < end; i += kLanes) {
        const Vec<T> v = i + kLanes <= end ? load(x + i) : load_part(x + i, end - i, low);
        const Vec<T> p = vmax(((v - max) - t.hi) - t.lo, Vec<T>{});
        sum += p;
        above += p > Vec<T>{};
      }
      total += double(reduce_add(sum));
      active -= int64_t(reduce_add(above));
    }
    tau += (total - 1) / double(active);
    if (active >= support) return Threshold<A>(tau);
    support = active;
  }
}

// Room for the candidates of a row: a whole vector may be written behind them.
template <class A>
struct Candidates {
  std::unique_ptr<A[]> values;
  std::unique_ptr<int32_t[]> indices;
  explicit Candidates(int64_t n) : values(new A[n + kFloats]), indices(new int32_t[n + kFloats]) {}
};

template <class T>
inline void sparsemax_row(const T* x, T* y, int64_t n, Candidates<Acc<T>>& candidates) {
  using A = Acc<T>;
  constexpr int kLanes = Accumulate<T>::kLanes;
  const A low = -std::numeric_limits<A>::infinity();
  A max = low;
  int64_t count = 0;
  bool collect = n > kShortRow && n <= std::numeric_limits<int32_t>::max();
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int64_t end = std::min(begin + kBlock, n);
    const A block = max_or_nan(x + begin, end - begin);
    max = block > max || block != block ? block : max;
    if (!(max < -low)) break;  // NaN or +inf
    if (!collect || block - max <= A(-1)) continue;
    for (int64_t i = begin; i < end; i += kLanes) {
      const Vec<T> v = i + kLanes <= end ? load(x + i) : load_part(x + i, end - i, low);
      count += append_above(v - max, A(-1), int32_t(i), &candidates.values[count], &candidates.indices[count]);
    }
    collect = count <= end / 8;
  }
  if (!(max < -low) || max == low) {  // NaN and +inf make the row NaN, -inf alone makes it zero
    T fill;
    store_one(&fill, max == low ? A(0) : std::numeric_limits<A>::quiet_NaN());
    std::fill_n(y, n, fill);
  } else if (collect) {
    // The values were taken relative to the maximum so far; the row's own elements tell them exactly.
    for (int64_t j = 0; j < count; ++j) candidates.values[j] = load_one(x + candidates.indices[j]);
    const Threshold<A> t = find_threshold(candidates.values.get(), count, max);
    std::fill_n(y, n, T{});
    for (int64_t j = 0; j < count; ++j) {
      const A p = ((candidates.values[j] - max) - t.hi) - t.lo;
      if (p > 0) store_one(y + candidates.indices[j], p);
    }
  } else {
    const Threshold<A> t = find_threshold(x, n, max);
    const auto probability = [&](Vec<T> v) { return vmax(((v - max) - t.hi) - t.lo, Vec<T>{}); };
    int64_t i = 0;
    for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
      const Pair<Vec<T>> v = load2(x + i);
      store2(y + i, {probability(v.a), probability(v.b)});
    }
    for (; i + kLanes <= n; i += kLanes) store(y + i, probability(load(x + i)));
    if (i < n) store_part(y + i, n - i, probability(load_part(x + i, n - i, low)));
  }
}

// grad_input = g - mean of g over the support on the support, 0 elsewhere; NaN where p is NaN.
template <class T>
inline void sparsemax_bwd_row(const T* p, const T* g, T* out, int64_t n) {
  using A = Acc<T>;
  constexpr int kLanes = Accumulate<T>::kLanes;
  double total = 0;
  int64_t support = 0;
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int64_t end = std::min(begin + kBlock, n);
    Vec<T> sum = {};
    auto above = sum > sum;
    for (int64_t i = begin; i < end; i += kLanes) {
      const bool whole = i + kLanes <= end;
      const Vec<T> pv = whole ? load(p + i) : load_part(p + i, end - i, A(0));
      const Vec<T> gv = whole ? load(g + i) : load_part(g + i, end - i, A(0));
      const auto outside = pv <= Vec<T>{};
      sum += outside ? Vec<T>{} : gv;
      above += ~outside;
    }
    total += double(reduce_add(sum));
    support -= int64_t(reduce_add(above));
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

template <class T>
void fwd_rows(const EntmaxParams& p, int64_t begin, int64_t end) {
  const T* input = static_cast<const T*>(p.input);
  T* output = static_cast<T*>(p.output);
  const int64_t n = p.rows.n;
  Candidates<Acc<T>> candidates(n);
  if (p.rows.stride_n == 1 && p.output_rows.stride_n == 1) {
    for (int64_t row = begin; row < end; ++row)
      sparsemax_row(input + row_offset(p.rows, row), output + row_offset(p.output_rows, row), n, candidates);
    return;
  }
  const std::unique_ptr<T[]> tile(new T[kTileRows * n]);
  for (int64_t row = begin; row < end;) {
    const int64_t count = std::min<int64_t>({kTileRows, end - row, p.rows.inner - row % p.rows.inner});
    gather(input + row_offset(p.rows, row), n, p.rows, count, tile.get());
    for (int64_t i = 0; i < count; ++i) sparsemax_row(&tile[i * n], &tile[i * n], n, candidates);
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
  if (p.output_rows.stride_n == 1 && p.grad_output_rows.stride_n == 1 && p.grad_input_rows.stride_n == 1) {
    for (int64_t row = begin; row < end; ++row)
      sparsemax_bwd_row(output + row_offset(p.output_rows, row), grad_output + row_offset(p.grad_output_rows, row),
                        grad_input + row_offset(p.grad_input_rows, row), n);
    return;
  }
  const std::unique_ptr<T[]> probabilities(new T[kTileRows * n]), gradients(new T[kTileRows * n]);
  for (int64_t row = begin; row < end;) {
    const int64_t count = std::min<int64_t>({kTileRows, end - row, p.output_rows.inner - row % p.output_rows.inner});
    gather(output + row_offset(p.output_rows, row), n, p.output_rows, count, probabilities.get());
    gather(grad_output + row_offset(p.grad_output_rows, row), n, p.grad_output_rows, count, gradients.get());
    for (int64_t i = 0; i < count; ++i)
      sparsemax_bwd_row(&probabilities[i * n], &gradients[i * n], &gradients[i * n], n);
    scatter(gradients.get(), n, p.grad_input_rows, count, grad_input + row_offset(p.grad_input_rows, row));
    row += count;
  }
}

void sparsemax_fwd_rows(const EntmaxParams& p, int64_t begin, int64_t end) { TSE_EACH_DTYPE(fwd_rows, p, begin, end) }
void sparsemax_bwd_rows(const EntmaxParams& p, int64_t begin, int64_t end) { TSE_EACH_DTYPE(bwd_rows, p, begin, end) }
