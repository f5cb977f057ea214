// Rows of selective log-softmax on the CPU. [per ISA]
//
// Forward reads each logit once from memory, backward once more. The own class of a row (exp_sum-inl.h) is the one that
// index names first, or another one that it names and that has more than half of the probability: then the row is
// summed once more, from cache. So a log-probability next to 0 has all its digits, and one that must be 0 is 0. The
// entropy is Σ p (log p[largest] - log p) - log p[largest], two sums of terms that are not negative: of a row with one
// possible class it is exactly 0. So a block's largest logit is found first, which also loads the block into L1.
#if defined(TSE_SELECTIVE_LOG_SOFTMAX_CPU_INL_H) == defined(TSE_ISA_TOGGLE)
#ifdef TSE_SELECTIVE_LOG_SOFTMAX_CPU_INL_H
#undef TSE_SELECTIVE_LOG_SOFTMAX_CPU_INL_H
#else
#define TSE_SELECTIVE_LOG_SOFTMAX_CPU_INL_H
#endif
#include "common/cpu/exp_sum-inl.h"

// Part of a row: BlockSum's m and sum, t of the largest logit, and Σ 2^t (t - largest), with t = (z - m) · scale.
struct EntropySum {
  double m = -std::numeric_limits<double>::infinity();
  double sum = 0;
  double largest = 0;
  double linear = 0;
};

// Against the larger reference, as sums without entropy are joined: with the same bits.
inline EntropySum join(EntropySum a, EntropySum b, double scale) {
  if (b.m > a.m) std::swap(a, b);
  const double down = a.m == b.m ? 0 : (b.m - a.m) * scale, factor = std::exp2(down);
  const double sum = a.sum;
  if (b.sum != 0) a.sum += factor * b.sum;
  if (factor == 0 || b.m == -std::numeric_limits<double>::infinity()) return a;  // NaN alone is in the sum
  const double largest = std::max(a.largest, b.largest + down);
  a.linear += sum * (a.largest - largest);
  if (b.linear != 0 || b.sum != 0) a.linear += factor * (b.linear + b.sum * (b.largest + down - largest));
  a.largest = largest;
  return a;
}

// In the order of block_sum, so that the sum has the same bits with and without entropy.
template <bool kEntropy, bool kCapped, class T>
[[gnu::flatten]] inline EntropySum block_sums(const T* x, int64_t n, int64_t own, Acc<T> row_reference,
                                              const Logits<T>& logits) {
  using A = Acc<T>;
  EntropySum result;
  const Vec<T> lowest = splat<Vec<T>>(kLowestExponent<A>);
  const Vec<T> max = kEntropy ? logits.cap(splat<Vec<T>>(block_max(x, n))) : Vec<T>{};
  const BlockSum s = block_sums_by(x, n, row_reference, logits, [&](A m) {
    const Vec<T> reference = splat<Vec<T>>(m);
    const Vec<T> largest = kEntropy ? vmax(lowest, logits.exponent(max, reference)) : Vec<T>{};
    Vec<T> sum[4] = {}, linear[4] = {};
    for_vectors(x, n, own, [&](int k, Vec<T> v, int64_t, auto used) {
      Vec<T> t = logits.exponent(kCapped ? logits.cap(v) : v, reference);
      if (kEntropy) t = vmax(lowest, t);
      const Vec<T> term = chosen(used, exp2<T>(t));
      sum[k] += term;
      if (kEntropy) linear[k] += term * (t - largest);
    });
    result.largest = double(largest[0]);
    result.linear = double(reduce_add((linear[0] + linear[1]) + (linear[2] + linear[3])));
    return BlockSum{double(m), double(reduce_add((sum[0] + sum[1]) + (sum[2] + sum[3])))};
  });
  result.m = s.m;
  result.sum = s.sum;
  return result;
}

// A row's sums without its own class, and what they are with it.
template <class T>
struct RowSums : EntropySum {
  using A = Acc<T>;
  int64_t own;
  double own_term = 0, all = 0;

  template <bool kEntropy, bool kCapped, class Team>
  static RowSums of(Team team, const T* x, int64_t n, int64_t own, const Logits<T>& logits) {
    const A reference = row_reference(x, n, own, logits);
    const double scale = double(logits.scale[0]);
    RowSums r{reduce_row(
        team, n, kBlock, EntropySum(),
        [&](int64_t begin, int64_t end) {
          return block_sums<kEntropy, kCapped>(x + begin, end - begin, own - begin, reference, logits);
        },
        [&](const EntropySum& a, const EntropySum& b) { return join(a, b, scale); })};
    r.own = own;
    if (own >= 0) {
      const A z = logits.z_of(x + own);
      r.own_term = logits.term_of(z, A(r.m));
      const double t = std::max(double(kLowestExponent<A>), (double(z) - r.m) * scale);
      if (kEntropy) r.linear += r.own_term * (t - r.largest);
    }
    r.all = r.sum + r.own_term;
    return r;
  }

  double log_probability(const T* x, int64_t c, const Logits<T>& logits) const {
    const A z = logits.z_of(x + c);
    const double term = c == own ? own_term : double(logits.term_of(z, A(m)));
    return -negative_log(term, c == own ? sum : all - term, m - double(z), logits.slope);
  }
};

template <bool kEntropy, bool kCapped, class T, class Team>
void fwd_rows_of(const SelectiveLogSoftmaxParams& p, int64_t begin, int64_t end, Team team) {
  using A = Acc<T>;
  const Logits<T> logits(p.transform);
  for (int64_t row = begin; row < end; ++row) {
    const T* x = static_cast<const T*>(p.input) + row_offset(p.rows, row);
    const auto sums = [&](int64_t own) {
      return RowSums<T>::template of<kEntropy, kCapped>(team, x, p.rows.n, own, logits);
    };
    RowSums<T> s = sums(p.k > 0 ? index_of(p, row, 0) : -1);
    for (int64_t k = 1; k < p.k && !(s.own_term > s.all / 2); ++k) {
      const int64_t c = index_of(p, row, k);
      if (c != s.own && logits.term_of(logits.z_of(x + c), A(s.m)) > s.all / 2) s = sums(c);
    }
    A* logp = static_cast<A*>(p.logp) + row * p.k;
    for (int64_t k = 0; k < p.k; ++k) logp[k] = A(s.log_probability(x, index_of(p, row, k), logits));
    static_cast<A*>(p.row_m)[row] = A(s.m);
    static_cast<A*>(p.row_sum)[row] = A(s.all);
    static_cast<A*>(p.row_others)[row] = A(s.sum);
    if (!kEntropy) continue;
    const double largest_term = exp2<T>(splat<Vec<T>>(A(s.largest)))[0], mean = s.linear / s.all;
    const double log_largest =
        s.own_term == largest_term ? std::log1p(s.sum / s.own_term) : std::log(s.all / largest_term);
    static_cast<A*>(p.entropy)[row] = A(log_largest - mean * double(kLn2<A>));
    static_cast<A*>(p.row_mean)[row] = A(s.largest + mean);
  }
}

template <class T>
void fwd(const SelectiveLogSoftmaxParams& p, int64_t begin, int64_t end) {
  const bool capped = p.transform.softcap > 0;
  with_team(p.share_row, [&](auto team) {
    if (p.entropy != nullptr) {
      if (capped) fwd_rows_of<true, true, T>(p, begin, end, team);
      else fwd_rows_of<true, false, T>(p, begin, end, team);
    } else {
      if (capped) fwd_rows_of<false, true, T>(p, begin, end, team);
      else fwd_rows_of<false, false, T>(p, begin, end, team);
    }
  });
}

// -p (Σ g + g_H (log p + H)) of all classes. kGeneral: with entropy or softcap.
template <bool kGeneral, bool kCapped, class T, class Team>
[[gnu::flatten]] inline void write_gradient(Team team, const T* x, T* g, int64_t n, const SelectiveGrad<Acc<T>>& f,
                                            const Logits<T>& logits) {
  using A = Acc<T>;
  const Vec<T> m = splat<Vec<T>>(f.m), mean = splat<Vec<T>>(f.mean), lowest = splat<Vec<T>>(kLowestExponent<A>);
  const Vec<T> level = splat<Vec<T>>(-f.level), slope = splat<Vec<T>>(-f.slope), one = splat<Vec<T>>(A(1));
  const auto grad = [&](Vec<T> v) {
    if (!kGeneral) return exp2<T>(logits.exponent(v, m)) * level;
    if (kCapped) v = logits.cap(v);
    const Vec<T> t = vmax(lowest, logits.exponent(v, m));
    const Vec<T> grad_s = exp2<T>(t) * (level + slope * (t - mean));
    return kCapped ? grad_s * (one - v * v) : grad_s;
  };
  for_parts(team, n, kBlock, [&](int64_t begin, int64_t end) { map_row(g + begin, end - begin, grad, x + begin); });
}

// A class that was asked for, and the gradient of its log-probability.
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
    with_team(p.share_row, [&](auto team) {
      if (logits.capped) write_gradient<true, true>(team, x, g, p.rows.n, f, logits);
      else if (p.grad_entropy != nullptr) write_gradient<true, false>(team, x, g, p.rows.n, f, logits);
      else write_gradient<false, false>(team, x, g, p.rows.n, f, logits);
    });
    // The same class may be asked for several times: sorting brings its gradients together.
    const auto before = [](const Asked& a, const Asked& b) { return a.index < b.index; };
    if (count > 1) std::sort(asked.get(), asked.get() + count, before);
    for (int64_t k = 0; k < count;) {
      const int64_t c = asked[k].index;
      double grad = 0;
      for (; k < count && asked[k].index == c; ++k) grad += asked[k].grad;
      const double z = logits.z_of(x + c), sum = f.sum;
      const Vec<T> t =
          vmax(splat<Vec<T>>(kLowestExponent<A>), logits.exponent(splat<Vec<T>>(A(z)), splat<Vec<T>>(f.m)));
      const double term = exp2<T>(t)[0], probability = term / sum;
      const double complement =
          term > sum / 2 ? double(static_cast<const A*>(p.row_others)[row]) / sum : 1 - probability;
      double of_class = (grad * complement - (total - grad) * probability) / p.transform.temperature;
      if (p.grad_entropy != nullptr) of_class -= term * double(f.slope) * (double(t[0]) - double(f.mean));
      store_one(g + c, A(logits.capped ? of_class * (1 - z * z) : of_class));
    }
  }
}

void selective_log_softmax_fwd_rows(const SelectiveLogSoftmaxParams& p, int64_t begin, int64_t end) {
  TSE_BY_DTYPE(p.dtype, fwd, p, begin, end)
}
void selective_log_softmax_bwd_rows(const SelectiveLogSoftmaxParams& p, int64_t begin, int64_t end) {
  TSE_BY_DTYPE(p.dtype, bwd, p, begin, end)
}
#endif
