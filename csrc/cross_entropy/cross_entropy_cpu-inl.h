// Cross-entropy rows on the CPU. [per ISA]
//
// loss = lse - x[target], lse = log Σ exp(x); grad = (exp(x - lse) - [c == target]) · factor.
// Forward reads each logit once; backward reads it once more and writes the gradient once. Where the incoming gradient
// is known beforehand both happen row by row, and the second reading is from cache. Log-probabilities are never stored.
//
// exp is taken in base 2 against an integer reference m, so that x · log2(e) - m is exact in one fused multiply-add, and
// sums with different references are joined by powers of two, without rounding. The reference is ≥ the maximum of the
// row's first block. Later blocks keep it without looking for their own maximum: terms may well be above 1, and a block
// whose sum shows that it is not near the reference is added up again with its own.
// L = log2(e) rounded to the type stands for the base on the way there and back: only differences feel its error.
// A target that has nearly all of the probability is compared with the sum in the same arithmetic that built the sum,
// so that a loss and a gradient that must be 0 are 0.

constexpr int64_t kBlock = kCrossEntropyBlock;
constexpr BlockSum kNothing = {-std::numeric_limits<double>::infinity(), 0};

inline BlockSum join(BlockSum a, BlockSum b) {
  if (b.m > a.m) std::swap(a, b);
  if (b.sum != 0) a.sum += a.m == b.m ? b.sum : b.sum * std::exp2(b.m - a.m);  // infinite m with sum 0 says nothing
  return a;
}

template <class T>
inline double natural_lse(const BlockSum& s) {
  return (s.m + std::log2(s.sum)) / double(kLog2e<Acc<T>>);
}

// Max of `x`, NaN aside.
template <class T>
inline Acc<T> block_max(const T* x, int64_t n) {
  using A = Acc<T>;
  constexpr int kLanes = Accumulate<T>::kLanes;
  const A low = -std::numeric_limits<A>::infinity();
  Vec<T> m0 = splat<Vec<T>>(low), m1 = m0;
  int64_t i = 0;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
    const Pair<Vec<T>> v = load2(x + i);
    m0 = vmax(v.a, m0);
    m1 = vmax(v.b, m1);
  }
  for (; i < n; i += kLanes) m0 = vmax(i + kLanes <= n ? load(x + i) : load_part(x + i, n - i, low), m0);
  return reduce_max(vmax(m0, m1));
}

template <class T>
inline Acc<T> reference_of(const T* x, int64_t n) {
  return std::ceil(block_max(x, n) * kLog2e<Acc<T>>);
}

// Σ exp2(x · L - m).
template <class T>
inline Acc<T> block_sum(const T* x, int64_t n, Acc<T> m) {
  using A = Acc<T>;
  constexpr int kLanes = Accumulate<T>::kLanes;
  const Vec<T> reference = splat<Vec<T>>(m);
  const auto term = [reference](Vec<T> v) { return exp2(exponent(v, reference)); };
  Vec<T> s0 = {}, s1 = {}, s2 = {}, s3 = {};
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
    const Pair<Vec<T>> v = load2(x + i), w = load2(x + i + 2 * kLanes);
    s0 += term(v.a);
    s1 += term(v.b);
    s2 += term(w.a);
    s3 += term(w.b);
  }
  for (; i < n; i += kLanes)
    s0 += term(i + kLanes <= n ? load(x + i) : load_part(x + i, n - i, -std::numeric_limits<A>::infinity()));
  return reduce_add((s0 + s1) + (s2 + s3));
}

// One block's sum, against the row's reference where that serves, else against its own.
template <class T>
inline BlockSum block_exp_sum(const T* x, int64_t n, Acc<T> row_reference) {
  using A = Acc<T>;
  const A low = -std::numeric_limits<A>::infinity();
  if (row_reference != low) {
    const A sum = block_sum(x, n, row_reference);
    if (sum <= A(16 * kBlock)) return {double(row_reference), double(sum)};
  }
  const A m = reference_of(x, n);
  if (m != low) return {double(m), double(block_sum(x, n, m))};
  BlockSum nothing = kNothing;  // -inf adds nothing; a NaN must be seen
  for (int64_t i = 0; i < n; ++i) {
    const A v = load_one(x + i);
    if (v != v) nothing.sum = v;
  }
  return nothing;
}

template <class T>
inline BlockSum row_exp_sum(const T* x, int64_t n) {
  const Acc<T> reference = reference_of(x, std::min(kBlock, n));
  BlockSum s = kNothing;
  for (int64_t i = 0; i < n; i += kBlock) s = join(s, block_exp_sum(x + i, std::min(kBlock, n - i), reference));
  return s;
}

// exp2(x · L - m), the term of one logit, with the bits that it has in the sum.
template <class T>
inline Acc<T> term_of(const T* x, Acc<T> m) {
  return exp2(exponent(splat<Vec<T>>(load_one(x)), splat<Vec<T>>(m)))[0];
}

// -log p of the target.
template <class T>
inline Acc<T> loss_of(const BlockSum& s, const T* target) {
  const double term = term_of(target, Acc<T>(s.m));
  if (term > 0.25 * s.sum) return Acc<T>(std::max(0.0, std::log2(s.sum / term) / double(kLog2e<Acc<T>>)));
  return Acc<T>(natural_lse<T>(s) - double(load_one(target)));
}

// Turns exp2(x · L - m) into exp(x - lse) · factor.
template <class A>
struct GradScale {
  A m, scale;   // scale = factor / sum
  double sum;   // Σ exp2(x · L - m), back from lse
  A factor;
  GradScale(double lse, A factor) : factor(factor) {
    const double lse2 = lse * double(kLog2e<A>);
    m = A(std::ceil(lse2));
    sum = std::exp2(lse2 - double(m));
    scale = A(factor / sum);
  }
  A at_target(A term) const { return A((double(term) / sum - 1) * factor); }
};

// The gradient of elements [begin, end) of a row.
template <class T>
inline void grad_row(const T* x, T* g, int64_t begin, int64_t end, int64_t target, double lse, Acc<T> factor) {
  using A = Acc<T>;
  constexpr int kLanes = Accumulate<T>::kLanes;
  const GradScale<A> s(lse, factor);
  const A at_target = s.at_target(term_of(x + target, s.m));  // before the gradient may overwrite the logits
  const Vec<T> m = splat<Vec<T>>(s.m);
  const auto value = [m, scale = s.scale](Vec<T> v) { return exp2(exponent(v, m)) * scale; };
  int64_t i = begin;
  for (; i + 2 * kLanes <= end; i += 2 * kLanes) {
    const Pair<Vec<T>> v = load2(x + i);
    store2(g + i, {value(v.a), value(v.b)});
  }
  for (; i + kLanes <= end; i += kLanes) store(g + i, value(load(x + i)));
  if (i < end) store_part(g + i, end - i, value(load_part(x + i, end - i, A(0))));
  if (target >= begin && target < end) store_one(g + target, at_target);
}

// ---- the class dimension is not the last one: the lanes of a vector are neighbouring rows -------------------------

// Columns [0, count) of rows that lie `stride` apart; count ≤ kLanes. `loss` is row-wise, not reduced.
template <class T>
inline void fwd_columns(const T* x, int64_t n, int64_t stride, int64_t count, Acc<T>* m_out, Acc<T>* sum_out) {
  using A = Acc<T>;
  constexpr int kLanes = Accumulate<T>::kLanes;
  const A low = -std::numeric_limits<A>::infinity();
  const auto column = [&](int64_t c) {
    return count == kLanes ? load(x + c * stride) : load_part(x + c * stride, count, A(0));
  };
  Vec<T> max = splat<Vec<T>>(low);
  for (int64_t c = 0; c < n; ++c) max = vmax(column(c), max);
  for (int i = 0; i < kLanes; ++i) max[i] = max[i] == low ? A(0) : std::ceil(max[i] * kLog2e<A>);
  Vec<T> sum = {};
  for (int64_t c = 0; c < n; ++c) sum += exp2(exponent(column(c), max));
  store(m_out, max);
  store(sum_out, sum);
}

template <class T>
inline void bwd_columns(const T* x, int64_t stride, T* g, int64_t grad_stride, int64_t n, int64_t count, Vec<T> m,
                        Vec<T> scale) {
  using A = Acc<T>;
  constexpr int kLanes = Accumulate<T>::kLanes;
  for (int64_t c = 0; c < n; ++c) {
    const auto value = [&](Vec<T> v) { return exp2(exponent(v, m)) * scale; };
    if (count == kLanes) store(g + c * grad_stride, value(load(x + c * stride)));
    else store_part(g + c * grad_stride, count, value(load_part(x + c * stride, count, A(0))));
  }
}

// ---- rows ---------------------------------------------------------------------------------------------------------

template <class T>
inline void finish_row(const CrossEntropyParams& p, int64_t row, const BlockSum& s, const T* x) {
  const int64_t target = target_of(p, row);
  const bool counted = target != p.ignore_index;
  static_cast<Acc<T>*>(p.row_loss)[row] = counted ? loss_of(s, x + target * p.rows.stride_n) : Acc<T>(0);
  p.lse[row] = natural_lse<T>(s);
}

template <class T>
inline void finish_row_grad(const CrossEntropyParams& p, int64_t row, int64_t begin, int64_t end) {
  const T* x = static_cast<const T*>(p.input) + row_offset(p.rows, row);
  T* g = static_cast<T*>(p.grad_input) + row_offset(p.grad_rows, row);
  const int64_t target = target_of(p, row);
  if (target == p.ignore_index) std::fill(g + begin, g + end, T{});
  else grad_row(x, g, begin, end, target, p.lse[row], factor_of<Acc<T>>(p, row));
}

// How many rows from `row` on can share vectors: those that are neighbours in memory.
template <class T>
inline int64_t neighbours(const Rows& rows, int64_t row, int64_t end) {
  return std::min<int64_t>({Accumulate<T>::kLanes, end - row, rows.inner - row % rows.inner});
}

template <class T>
inline void fwd_column_rows(const CrossEntropyParams& p, int64_t row, int64_t count) {
  const T* x = static_cast<const T*>(p.input) + row_offset(p.rows, row);
  Acc<T> m[Accumulate<T>::kLanes], sum[Accumulate<T>::kLanes];
  fwd_columns(x, p.rows.n, p.rows.stride_n, count, m, sum);
  for (int64_t i = 0; i < count; ++i) finish_row(p, row + i, {double(m[i]), double(sum[i])}, x + i);
}

template <class T>
inline void bwd_column_rows(const CrossEntropyParams& p, int64_t row, int64_t count) {
  using A = Acc<T>;
  const int64_t n = p.rows.n, stride = p.rows.stride_n, grad_stride = p.grad_rows.stride_n;
  const T* x = static_cast<const T*>(p.input) + row_offset(p.rows, row);
  T* g = static_cast<T*>(p.grad_input) + row_offset(p.grad_rows, row);
  Vec<T> m = {}, scale = {};
  A at_target[Accumulate<T>::kLanes];
  for (int64_t i = 0; i < count; ++i) {
    const int64_t target = target_of(p, row + i);
    if (target == p.ignore_index) continue;
    const GradScale<A> s(p.lse[row + i], factor_of<A>(p, row + i));
    m[i] = s.m;
    scale[i] = s.scale;
    at_target[i] = s.at_target(term_of(x + target * stride + i, s.m));
  }
  bwd_columns(x, stride, g, grad_stride, n, count, m, scale);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t target = target_of(p, row + i);
    if (target != p.ignore_index) {
      store_one(g + target * grad_stride + i, at_target[i]);
    } else {  // exp2(…) · 0 is NaN where the ignored logits are not finite
      for (int64_t c = 0; c < n; ++c) g[c * grad_stride + i] = T{};
    }
  }
}

template <class T, bool kForward, bool kBackward>
void rows(const CrossEntropyParams& p, int64_t begin, int64_t end) {
  const int64_t n = p.rows.n;
  if (p.rows.stride_n == 1 && (!kBackward || p.grad_rows.stride_n == 1)) {
    for (int64_t row = begin; row < end; ++row) {
      const T* x = static_cast<const T*>(p.input) + row_offset(p.rows, row);
      if (kForward) finish_row(p, row, row_exp_sum(x, n), x);
      if (kBackward) finish_row_grad<T>(p, row, 0, n);
    }
    return;
  }
  for (int64_t row = begin; row < end;) {
    const int64_t count = neighbours<T>(p.rows, row, end);
    if (kForward) fwd_column_rows<T>(p, row, count);
    if (kBackward) bwd_column_rows<T>(p, row, count);
    row += count;
  }
}

template <class T>
void block_sums(const CrossEntropyParams& p, int64_t row, int64_t begin, int64_t end, BlockSum* sums) {
  const T* x = static_cast<const T*>(p.input) + row_offset(p.rows, row);
  const Acc<T> reference = reference_of(x, std::min(kBlock, p.rows.n));
  for (int64_t b = begin; b < end; ++b)
    sums[b] = block_exp_sum(x + b * kBlock, std::min(kBlock, p.rows.n - b * kBlock), reference);
}

template <class T>
void finish_blocks(const CrossEntropyParams& p, int64_t row, const BlockSum* sums) {
  BlockSum s = kNothing;
  for (int64_t b = 0; b * kBlock < p.rows.n; ++b) s = join(s, sums[b]);
  finish_row(p, row, s, static_cast<const T*>(p.input) + row_offset(p.rows, row));
}

template <class T>
void bwd_blocks(const CrossEntropyParams& p, int64_t row, int64_t begin, int64_t end) {
  finish_row_grad<T>(p, row, begin * kBlock, std::min(end * kBlock, p.rows.n));
}

template <class T>
void fwd(const CrossEntropyParams& p, int64_t begin, int64_t end) {
  rows<T, true, false>(p, begin, end);
}
template <class T>
void bwd(const CrossEntropyParams& p, int64_t begin, int64_t end) {
  rows<T, false, true>(p, begin, end);
}
template <class T>
void fwd_bwd(const CrossEntropyParams& p, int64_t begin, int64_t end) {
  rows<T, true, true>(p, begin, end);
}

void cross_entropy_fwd_rows(const CrossEntropyParams& p, int64_t begin, int64_t end) {
  TSE_EACH_DTYPE(fwd, p, begin, end)
}
void cross_entropy_bwd_rows(const CrossEntropyParams& p, int64_t begin, int64_t end) {
  TSE_EACH_DTYPE(bwd, p, begin, end)
}
void cross_entropy_fwd_bwd_rows(const CrossEntropyParams& p, int64_t begin, int64_t end) {
  TSE_EACH_DTYPE(fwd_bwd, p, begin, end)
}
void cross_entropy_block_sums(const CrossEntropyParams& p, int64_t row, int64_t begin, int64_t end, BlockSum* sums) {
  TSE_EACH_DTYPE(block_sums, p, row, begin, end, sums)
}
void cross_entropy_finish_row(const CrossEntropyParams& p, int64_t row, const BlockSum* sums) {
  TSE_EACH_DTYPE(finish_blocks, p, row, sums)
}
void cross_entropy_bwd_blocks(const CrossEntropyParams& p, int64_t row, int64_t begin, int64_t end) {
  TSE_EACH_DTYPE(bwd_blocks, p, row, begin, end)
}
