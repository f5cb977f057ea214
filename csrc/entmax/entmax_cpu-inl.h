// Sparsemax rows on the CPU. [per ISA]
//
// p = max(x - tau, 0) with Σ p = 1 (Martins & Astudillo 2016). tau without sorting: only elements above max - 1 can be
// in the support, these candidates are compacted, and Newton's (= Michelot's) step from below,
//   tau ← tau + (Σ (x - tau)_+ - 1) / #{x > tau},
// ends exactly when the support stops changing. Passes over the row: max, candidates, result; from memory only the
// first. All is relative to the row's maximum, and tau is held as the sum of two numbers: in a support of 10^5 elements
// of 10^-5 the rounding of tau alone would show in Σ p.

template <class A>
struct Threshold {
  A hi, lo;
  explicit Threshold(double tau) : hi(A(tau)), lo(A(tau - double(hi))) {}
};

template <class A>
struct RowMax {
  A max;
  bool has_nan;
};

template <class T>
inline RowMax<Acc<T>> row_max(const T* x, int64_t n) {
  using A = Acc<T>;
  constexpr int kLanes = Accumulate<T>::kLanes;
  const A low = -std::numeric_limits<A>::infinity();
  Vec<T> m0 = splat<Vec<T>>(low), m1 = m0;
  auto nan0 = m0 != m0, nan1 = nan0;
  int64_t i = 0;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
    const Vec<T> a = load(x + i), b = load(x + i + kLanes);
    m0 = vmax(a, m0);
    m1 = vmax(b, m1);
    nan0 |= a != a;
    nan1 |= b != b;
  }
  for (; i < n; i += kLanes) {
    const Vec<T> a = i + kLanes <= n ? load(x + i) : load_part(x + i, n - i, low);
    m0 = vmax(a, m0);
    nan0 |= a != a;
  }
  nan0 |= nan1;
  bool has_nan = false;
  for (int lane = 0; lane < kLanes; ++lane) has_nan |= nan0[lane] != 0;
  return {reduce_max(vmax(m0, m1)), has_nan};
}

// The threshold relative to the maximum, from the `count` candidates d = x - max > -1, behind which lie -2s up to a
// whole vector.
template <class A, class V, int kLanes>
inline Threshold<A> find_threshold(const A* d, int64_t count) {
  double tau = -1;
  int64_t support = count + 1;
  while (true) {
    const Threshold<A> t(tau);
    V sum = {};
    auto above = sum > sum;  // counts downwards: true is -1
    for (int64_t i = 0; i < count; i += kLanes) {
      const V p = (load(d + i) - t.hi) - t.lo;
      const auto positive = p > V{};
      sum += positive ? p : V{};
      above += positive;
    }
    int64_t active = 0;
    for (int lane = 0; lane < kLanes; ++lane) active -= above[lane];
    tau += (double(reduce_add(sum)) - 1) / double(active);
    if (active >= support) return Threshold<A>(tau);
    support = active;
  }
}

template <class T>
inline void sparsemax_row(const T* x, T* y, int64_t n, Acc<T>* candidates) {
  using A = Acc<T>;
  constexpr int kLanes = Accumulate<T>::kLanes;
  const A low = -std::numeric_limits<A>::infinity();
  const RowMax<A> row = row_max(x, n);
  if (row.has_nan || !(row.max < -low) || row.max == low) {  // NaN and +inf make the row NaN, -inf alone makes it zero
    T fill;
    store_one(&fill, row.has_nan || row.max != low ? std::numeric_limits<A>::quiet_NaN() : A(0));
    std::fill_n(y, n, fill);
    return;
  }
  int64_t count = 0, i = 0;
  for (; i + kLanes <= n; i += kLanes) count += append_above(candidates + count, load(x + i) - row.max, A(-1));
  if (i < n) count += append_above(candidates + count, load_part(x + i, n - i, low) - row.max, A(-1));
  store(candidates + count, splat<Vec<T>>(A(-2)));
  const Threshold<A> t = find_threshold<A, Vec<T>, kLanes>(candidates, count);
  const auto probability = [&](Vec<T> v) { return vmax(((v - row.max) - t.hi) - t.lo, Vec<T>{}); };
  for (i = 0; i + kLanes <= n; i += kLanes) store(y + i, probability(load(x + i)));
  if (i < n) store_part(y + i, n - i, probability(load_part(x + i, n - i, low)));
}

// grad_input = g - mean of g over the support on the support, 0 elsewhere; NaN where p is NaN.
template <class T>
inline void sparsemax_bwd_row(const T* p, const T* g, T* out, int64_t n) {
  using A = Acc<T>;
  constexpr int kLanes = Accumulate<T>::kLanes;
  constexpr int64_t kBlock = 4096;  // sums of a block in the type, of blocks in double
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
    for (int lane = 0; lane < kLanes; ++lane) support -= above[lane];
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
  const std::unique_ptr<Acc<T>[]> candidates(new Acc<T>[n + Accumulate<T>::kLanes]);
  if (p.rows.stride_n == 1 && p.output_rows.stride_n == 1) {
    for (int64_t row = begin; row < end; ++row)
      sparsemax_row(input + row_offset(p.rows, row), output + row_offset(p.output_rows, row), n, candidates.get());
    return;
  }
  const std::unique_ptr<T[]> tile(new T[kTileRows * n]);
  for (int64_t row = begin; row < end;) {
    const int64_t count = std::min<int64_t>({kTileRows, end - row, p.rows.inner - row % p.rows.inner});
    gather(input + row_offset(p.rows, row), n, p.rows, count, tile.get());
    for (int64_t i = 0; i < count; ++i) sparsemax_row(&tile[i * n], &tile[i * n], n, candidates.get());
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
