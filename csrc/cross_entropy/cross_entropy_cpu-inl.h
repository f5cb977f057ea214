// Cross-entropy rows on the CPU. [per ISA]
//
// loss = lse - x[target], lse = log Σ exp(x); grad = (exp(x - lse) - [c == target]) · factor.
// Forward reads each logit once from memory, in blocks that stay in L1 between the search for the maximum and the sum.
// Backward reads it once more and writes the gradient once. Log-probabilities are never stored.
//
// exp is taken in base 2 and its reference point is an integer m ≥ max · log2(e), so that x · log2(e) - m is exact
// in one fused multiply-add, and sums with different reference points are joined by powers of two, without rounding.
// L = log2(e) rounded to the type stands for the base on the way there and back: only differences feel its error.
// A target that has nearly all of the probability is compared with the sum in the same arithmetic that built the sum,
// so that a loss and a gradient that must be 0 are 0.

constexpr int64_t kBlock = 4096;

// Σ exp2(x · L) = sum · 2^m.
struct ExpSum {
  double m = -std::numeric_limits<double>::infinity();
  double sum = 0;
};

inline ExpSum join(ExpSum a, ExpSum b) {
  if (b.m > a.m) std::swap(a, b);
  if (b.sum != 0) a.sum += a.m == b.m ? b.sum : b.sum * std::exp2(b.m - a.m);  // infinite m with sum 0 says nothing
  return a;
}

template <class T>
inline double natural_lse(const ExpSum& s) {
  return (s.m + std::log2(s.sum)) / double(kLog2e<Acc<T>>);
}

// Max of `x`, NaN aside.
template <class T>
inline Acc<T> block_max(const T* x, int64_t n) {
  using A = Acc<T>;
  constexpr int kLanes = Accumulate<T>::kLanes;
  const A low = -std::numeric_limits<A>::infinity();
  Vec<T> m0 = splat<Vec<T>>(low), m1 = m0, m2 = m0, m3 = m0;
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
    m0 = vmax(load(x + i), m0);
    m1 = vmax(load(x + i + kLanes), m1);
    m2 = vmax(load(x + i + 2 * kLanes), m2);
    m3 = vmax(load(x + i + 3 * kLanes), m3);
  }
  for (; i + kLanes <= n; i += kLanes) m0 = vmax(load(x + i), m0);
  if (i < n) m1 = vmax(load_part(x + i, n - i, low), m1);
  return reduce_max(vmax(vmax(m0, m1), vmax(m2, m3)));
}

template <class T>
inline ExpSum block_exp_sum(const T* x, int64_t n) {
  using A = Acc<T>;
  constexpr int kLanes = Accumulate<T>::kLanes;
  const A low = -std::numeric_limits<A>::infinity();
  const A max = block_max(x, n);
  if (max == low) {  // -inf adds nothing; a NaN must be seen
    ExpSum nothing;
    for (int64_t i = 0; i < n; ++i) {
      const A v = load_one(x + i);
      if (v != v) nothing.sum = v;
    }
    return nothing;
  }
  const A m = std::ceil(max * kLog2e<A>);
  const Vec<T> reference = splat<Vec<T>>(m);
  const auto term = [reference](Vec<T> v) { return exp2(exponent(v, reference)); };
  Vec<T> s0 = {}, s1 = {}, s2 = {}, s3 = {};
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
    s0 += term(load(x + i));
    s1 += term(load(x + i + kLanes));
    s2 += term(load(x + i + 2 * kLanes));
    s3 += term(load(x + i + 3 * kLanes));
  }
  for (; i + kLanes <= n; i += kLanes) s0 += term(load(x + i));
  if (i < n) s1 += term(load_part(x + i, n - i, low));
  return {double(m), double(reduce_add((s0 + s1) + (s2 + s3)))};
}

template <class T>
inline ExpSum row_exp_sum(const T* x, int64_t n) {
  ExpSum s;
  for (int64_t i = 0; i < n; i += kBlock) s = join(s, block_exp_sum(x + i, std::min(kBlock, n - i)));
  return s;
}

// exp2(x · L - m), the term of one logit, with the bits that it has in the sum.
template <class T>
inline Acc<T> term_of(const T* x, Acc<T> m) {
  return exp2(exponent(splat<Vec<T>>(load_one(x)), splat<Vec<T>>(m)))[0];
}

// -log p of the target.
template <class T>
inline Acc<T> loss_of(const ExpSum& s, const T* target) {
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

template <class T>
inline void grad_row(const T* x, T* g, int64_t n, int64_t target, double lse, Acc<T> factor) {
  using A = Acc<T>;
  constexpr int kLanes = Accumulate<T>::kLanes;
  const GradScale<A> s(lse, factor);
  const A at_target = s.at_target(term_of(x + target, s.m));
  const Vec<T> m = splat<Vec<T>>(s.m);
  const auto value = [m, scale = s.scale](Vec<T> v) { return exp2(exponent(v, m)) * scale; };
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(g + i, value(load(x + i)));
  if (i < n) store_part(g + i, n - i, value(load_part(x + i, n - i, A(0))));
  store_one(g + target, at_target);
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
inline void finish_row(const CrossEntropyParams& p, int64_t row, const ExpSum& s, const T* x) {
  const int64_t target = target_of(p, row);
  const bool counted = target != p.ignore_index;
  static_cast<Acc<T>*>(p.row_loss)[row] = counted ? loss_of(s, x + target * p.rows.stride_n) : Acc<T>(0);
  p.lse[row] = natural_lse<T>(s);
}

template <class T>
void fwd_rows(const CrossEntropyParams& p, int64_t begin, int64_t end) {
  const T* input = static_cast<const T*>(p.input);
  const int64_t n = p.rows.n;
  if (p.rows.stride_n == 1) {
    for (int64_t row = begin; row < end; ++row) {
      const T* x = input + row_offset(p.rows, row);
      finish_row(p, row, row_exp_sum(x, n), x);
    }
    return;
  }
  constexpr int kLanes = Accumulate<T>::kLanes;
  for (int64_t row = begin; row < end;) {
    const int64_t count = std::min<int64_t>({kLanes, end - row, p.rows.inner - row % p.rows.inner});
    const T* x = input + row_offset(p.rows, row);
    Acc<T> m[kLanes], sum[kLanes];
    fwd_columns(x, n, p.rows.stride_n, count, m, sum);
    for (int64_t i = 0; i < count; ++i) finish_row(p, row + i, {m[i], sum[i]}, x + i);
    row += count;
  }
}

template <class T>
void bwd_rows(const CrossEntropyParams& p, int64_t begin, int64_t end) {
  using A = Acc<T>;
  const T* input = static_cast<const T*>(p.input);
  T* grad = static_cast<T*>(p.grad_input);
  const int64_t n = p.rows.n;
  if (p.rows.stride_n == 1 && p.grad_rows.stride_n == 1) {
    for (int64_t row = begin; row < end; ++row) {
      T* g = grad + row_offset(p.grad_rows, row);
      const int64_t target = target_of(p, row);
      if (target == p.ignore_index) std::fill_n(g, n, T{});
      else grad_row(input + row_offset(p.rows, row), g, n, target, p.lse[row], factor_of<A>(p, row));
    }
    return;
  }
  constexpr int kLanes = Accumulate<T>::kLanes;
  const int64_t stride = p.rows.stride_n, grad_stride = p.grad_rows.stride_n;
  for (int64_t row = begin; row < end;) {
    const int64_t count = std::min<int64_t>({kLanes, end - row, p.rows.inner - row % p.rows.inner});
    const T* x = input + row_offset(p.rows, row);
    T* g = grad + row_offset(p.grad_rows, row);
    Vec<T> m = {}, scale = {};
    A at_target[kLanes];
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
    row += count;
  }
}

void cross_entropy_fwd_rows(const CrossEntropyParams& p, int64_t begin, int64_t end) {
  TSE_EACH_DTYPE(fwd_rows, p, begin, end)
}
void cross_entropy_bwd_rows(const CrossEntropyParams& p, int64_t begin, int64_t end) {
  TSE_EACH_DTYPE(bwd_rows, p, begin, end)
}
