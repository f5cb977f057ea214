// Rows of selective log-softmax on the CPU. [per ISA]
//
// Forward reads each logit once from memory, backward once more. A class that has nearly all of the probability is
// compared with the sum in the arithmetic that built the sum: a log-probability that must be 0 is 0, none is positive.
// The entropy is Σ p (log p[largest] - log p) - log p[largest], two sums of terms that are not negative: of a row with
// one possible class it is exactly 0. So a block's largest logit is looked for first, while the block comes into L1.
#include "common/cpu/exp_sum-inl.h"

// Part of a row: BlockSum's m and sum, t of the largest logit, and Σ 2^t (t - largest).
struct EntropySum {
  double m = -std::numeric_limits<double>::infinity();
  double sum = 0;
  double largest = 0;
  double linear = 0;
};

inline EntropySum join(EntropySum a, EntropySum b) {
  if (a.sum == 0 || (b.sum != 0 && b.m + b.largest > a.m + a.largest)) std::swap(a, b);
  if (b.sum == 0) return a;
  const double scale = std::exp2(b.m - a.m);
  a.linear += scale * (b.linear + b.sum * ((b.m - a.m) + (b.largest - a.largest)));
  a.sum += scale * b.sum;
  return a;
}

// In the order of block_sum, so that the sum has the same bits with and without entropy.
template <bool kEntropy, bool kCapped, class T>
[[gnu::flatten]] inline EntropySum block_sums(const T* x, int64_t n, Acc<T> row_reference, const Logits<T>& logits) {
  using A = Acc<T>;
  constexpr int kLanes = Accumulate<T>::kLanes;
  EntropySum result;
  const Vec<T> lowest = splat<Vec<T>>(kLowestExponent<A>);
  const Vec<T> max = kEntropy ? logits.cap(splat<Vec<T>>(block_max(x, n))) : Vec<T>{};
  const BlockSum s = block_sums_by(x, n, row_reference, logits, [&](A m) {
    const Vec<T> reference = splat<Vec<T>>(m), largest = vmax(lowest, logits.exponent(max, reference));
    Vec<T> s0 = {}, s1 = {}, s2 = {}, s3 = {}, l0 = {}, l1 = {}, l2 = {}, l3 = {};
    const auto add = [&](Vec<T> v, Vec<T>& sum, Vec<T>& linear, int64_t count) {
      Vec<T> t = logits.exponent(kCapped ? logits.cap(v) : v, reference);
      if (kEntropy) t = vmax(lowest, t);
      const Vec<T> term = first_lanes(exp2<T>(t), count);
      sum += term;
      if (kEntropy) linear += term * (t - largest);
    };
    const auto add2 = [&](int64_t i, Vec<T>& a, Vec<T>& b, Vec<T>& c, Vec<T>& d) {
      const Pair<Vec<T>> v = load2(x + i);
      add(v.a, a, c, kLanes);
      add(v.b, b, d, kLanes);
    };
    int64_t i = 0;
    for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
      add2(i, s0, s1, l0, l1);
      add2(i + 2 * kLanes, s2, s3, l2, l3);
    }
    if (i + 2 * kLanes <= n) add2(i, s0, s1, l0, l1), i += 2 * kLanes;
    for (; i < n; i += kLanes) {
      const int64_t count = std::min<int64_t>(kLanes, n - i);
      add(count == kLanes ? load(x + i) : load_part(x + i, count, -std::numeric_limits<A>::infinity()), s0, l0, count);
    }
    result.largest = double(largest[0]);
    result.linear = double(reduce_add((l0 + l1) + (l2 + l3)));
    return BlockSum{double(m), double(reduce_add((s0 + s1) + (s2 + s3)))};
  });
  result.m = s.m;
  result.sum = s.sum;
  return result;
}

template <bool kEntropy, bool kCapped, class T>
inline EntropySum row_sums(const T* x, int64_t n, const Logits<T>& logits) {
  const Acc<T> reference = row_reference(x, n, logits);
  if constexpr (!kEntropy && !kCapped) {
    BlockSum s = kNothing;
    for (int64_t i = 0; i < n; i += kBlock)
      s = join(s, block_exp_sum(x + i, std::min(kBlock, n - i), reference, logits));
    return {s.m, s.sum};
  }
  EntropySum s;
  for (int64_t i = 0; i < n; i += kBlock)
    s = join(s, block_sums<kEntropy, kCapped>(x + i, std::min(kBlock, n - i), reference, logits));
  return s;
}

template <class T>
inline double log_probability(const T* x, const EntropySum& s, double log2_sum, const Logits<T>& logits) {
  using A = Acc<T>;
  const double inf = std::numeric_limits<double>::infinity();
  // Not every level has -inf come through the exponent. A sum of 0 or NaN makes it NaN.
  if (load_one(x) == -std::numeric_limits<A>::infinity() && !logits.capped) return s.sum > 0 ? -inf : inf - inf;
  const double term = logits.term_of(x, A(s.m));
  // Already at 1/16: what exp2 is off by for half types is off in the sum of equal logits, too.
  const double l = term > s.sum / 16 ? std::log2(term / s.sum) : logits.exponent_of(x, A(s.m))[0] - log2_sum;
  return l > 0 ? 0 : l * kLn2<A>;
}

template <bool kEntropy, bool kCapped, class T>
void fwd_rows_of(const SelectiveLogSoftmaxParams& p, int64_t begin, int64_t end) {
  using A = Acc<T>;
  const Logits<T> logits(p.transform);
  for (int64_t row = begin; row < end; ++row) {
    const T* x = static_cast<const T*>(p.input) + row_offset(p.rows, row);
    const EntropySum s = row_sums<kEntropy, kCapped>(x, p.rows.n, logits);
    const double log2_sum = std::log2(s.sum);
    A* logp = static_cast<A*>(p.logp) + row * p.k;
    for (int64_t k = 0; k < p.k; ++k) logp[k] = A(log_probability(x + index_of(p, row, k), s, log2_sum, logits));
    static_cast<A*>(p.row_m)[row] = A(s.m);
    static_cast<A*>(p.row_sum)[row] = A(s.sum);
    if (!kEntropy) continue;
    const double largest_term = exp2<T>(splat<Vec<T>>(A(s.largest)))[0];
    static_cast<A*>(p.entropy)[row] = A((std::log2(s.sum / largest_term) - s.linear / s.sum) * kLn2<A>);
    static_cast<A*>(p.row_mean)[row] = A(s.largest + s.linear / s.sum);
  }
}

template <class T>
void fwd(const SelectiveLogSoftmaxParams& p, int64_t begin, int64_t end) {
  const bool capped = p.transform.softcap > 0;
  if (p.entropy != nullptr) {
    if (capped) fwd_rows_of<true, true, T>(p, begin, end);
    else fwd_rows_of<true, false, T>(p, begin, end);
  } else {
    if (capped) fwd_rows_of<false, true, T>(p, begin, end);
    else fwd_rows_of<false, false, T>(p, begin, end);
  }
}

// -p (Σ g + g_H (log p + H)) of all classes.
template <class T>
[[gnu::flatten]] inline void grad_row(const T* x, T* g, int64_t n, const SelectiveGrad<Acc<T>>& f,
                                      const Logits<T>& logits) {
  constexpr int kLanes = Accumulate<T>::kLanes;
  const Vec<T> m = splat<Vec<T>>(f.m), scale = splat<Vec<T>>(-f.level);
  int64_t i = 0;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
    const Pair<Vec<T>> t = terms2(x + i, m, logits);
    store2(g + i, {t.a * scale, t.b * scale});
  }
  for (; i < n; i += kLanes) {
    const bool whole = i + kLanes <= n;
    const Vec<T> grad = logits.term(whole ? load(x + i) : load_part(x + i, n - i, Acc<T>(0)), m) * scale;
    if (whole) store(g + i, grad);
    else store_part(g + i, n - i, grad);
  }
}

// The same with entropy or softcap.
template <bool kCapped, class T>
[[gnu::flatten]] inline void grad_row_general(const T* x, T* g, int64_t n, const SelectiveGrad<Acc<T>>& f,
                                              const Logits<T>& logits) {
  using A = Acc<T>;
  constexpr int kLanes = Accumulate<T>::kLanes;
  const Vec<T> m = splat<Vec<T>>(f.m), mean = splat<Vec<T>>(f.mean), lowest = splat<Vec<T>>(kLowestExponent<A>);
  const Vec<T> level = splat<Vec<T>>(-f.level), slope = splat<Vec<T>>(-f.slope), one = splat<Vec<T>>(A(1));
  const auto grad = [&](Vec<T> v) {
    if (kCapped) v = logits.cap(v);
    const Vec<T> t = vmax(lowest, logits.exponent(v, m));
    const Vec<T> grad_s = exp2<T>(t) * (level + slope * (t - mean));
    return kCapped ? grad_s * (one - v * v) : grad_s;
  };
  int64_t i = 0;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
    const Pair<Vec<T>> v = load2(x + i);
    store2(g + i, {grad(v.a), grad(v.b)});
  }
  for (; i < n; i += kLanes) {
    if (i + kLanes <= n) store(g + i, grad(load(x + i)));
    else store_part(g + i, n - i, grad(load_part(x + i, n - i, A(0))));
  }
}

// A class that was asked for, and what comes into its log-probability.
struct Asked {
  int64_t index;
  double grad;
};

template <class T>
void bwd(const SelectiveLogSoftmaxParams& p, int64_t begin, int64_t end) {
  using A = Acc<T>;
  const Logits<T> logits(p.transform);
  const int64_t count = p.grad_logp == nullptr ? 0 : p.k;
  const std::unique_ptr<Asked[]> asked(new Asked[count]);
  for (int64_t row = begin; row < end; ++row) {
    const T* x = static_cast<const T*>(p.input) + row_offset(p.rows, row);
    T* g = static_cast<T*>(p.grad_input) + row_offset(p.grad_rows, row);
    double total = 0;
    for (int64_t k = 0; k < count; ++k) {
      asked[k] = {index_of(p, row, k), double(static_cast<const A*>(p.grad_logp)[row * p.k + k])};
      total += asked[k].grad;
    }
    const SelectiveGrad<A> f = selective_grad<A>(p, row, total);
    if (logits.capped) grad_row_general<true>(x, g, p.rows.n, f, logits);
    else if (p.grad_entropy != nullptr) grad_row_general<false>(x, g, p.rows.n, f, logits);
    else grad_row(x, g, p.rows.n, f, logits);
    // The same class may be asked for several times: its gradients are neighbours after sorting.
    const auto before = [](const Asked& a, const Asked& b) { return a.index < b.index; };
    if (count > 1) std::sort(asked.get(), asked.get() + count, before);
    for (int64_t k = 0; k < count;) {
      const int64_t c = asked[k].index;
      double grad = 0;
      for (; k < count && asked[k].index == c; ++k) grad += asked[k].grad;
      const Vec<T> capped = logits.cap(splat<Vec<T>>(load_one(x + c)));
      const Vec<T> t = vmax(splat<Vec<T>>(kLowestExponent<A>), logits.exponent(capped, splat<Vec<T>>(f.m)));
      const double probability = double(exp2<T>(t)[0]) / double(f.sum), slope = f.slope * double(f.sum);
      // Not from f.level: a p that is rounded to 1 must leave exactly nothing.
      double of_class = (grad - probability * total) / p.transform.temperature;
      if (p.grad_entropy != nullptr) of_class -= probability * slope * (double(t[0]) - double(f.mean));
      store_one(g + c, A(logits.capped ? of_class * (1 - double(capped[0]) * double(capped[0])) : of_class));
    }
  }
}

void selective_log_softmax_fwd_rows(const SelectiveLogSoftmaxParams& p, int64_t begin, int64_t end) {
  TSE_EACH_DTYPE(fwd, p, begin, end)
}
void selective_log_softmax_bwd_rows(const SelectiveLogSoftmaxParams& p, int64_t begin, int64_t end) {
  TSE_EACH_DTYPE(bwd, p, begin, end)
}
