// Softmax and log-softmax rows on the CPU. [per ISA]
//
// p = exp(x - m) / Σ exp(x - m), and log p = (x - m) - log Σ exp(x - m). A row is read once from memory and once more
// from cache; the exponentials of a row of moderate length are kept there. A row of -inf alone gives zeros, and -inf.
#if defined(TSE_SOFTMAX_CPU_INL_H) == defined(TSE_ISA_TOGGLE)
#ifdef TSE_SOFTMAX_CPU_INL_H
#undef TSE_SOFTMAX_CPU_INL_H
#else
#define TSE_SOFTMAX_CPU_INL_H
#endif
#include "common/cpu/exp_sum-inl.h"
#include "common/cpu/row_map-inl.h"

// Whether the terms of a row are kept for the second walk. Longer rows are limited by caches and memory, which these
// would go through, too.
template <class T>
inline bool keeps_terms(int64_t n) {
  return n <= (sizeof(T) == 2 ? 16384 : sizeof(T) == 4 ? 3072 : 0);
}
template <class A>
struct KeptTerms {
  const std::unique_ptr<A[]> terms;
  const std::unique_ptr<double[]> references;  // of blocks
  explicit KeptTerms(int64_t n) : terms(new A[n + 2 * kFloats]), references(new double[n / kBlock + 1]) {}
};

template <class T, class Team>
inline void softmax_row(Team team, const T* x, T* y, int64_t n, const Logits<T, false>& logits,
                        const KeptTerms<Acc<T>>& kept) {
  using A = Acc<T>;
  using V = Vec<T>;
  const bool keeps = keeps_terms<T>(n);
  const A reference = row_reference(x, n, -1, logits);
  const BlockSum s = row_sums(team, n, logits, [&](int64_t begin, int64_t end) {
    if (!keeps) return block_exp_sum(x + begin, end - begin, -1, reference, logits);
    const BlockSum of_block =
        block_exp_sum<true>(x + begin, end - begin, -1, reference, logits, kept.terms.get() + begin);
    kept.references[begin / kBlock] = of_block.m;
    return of_block;
  });
  const double scale = s.sum == 0 ? 0 : 1 / s.sum, slope = double(logits.scale[0]);
  for_parts(team, n, kBlock, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i += kBlock) {
      const int64_t count = std::min(kBlock, end - i);
      if (keeps) {
        const double m = kept.references[i / kBlock];
        const V factor = splat<V>(A(m == s.m ? scale : scale * std::exp2((m - s.m) * slope)));
        map_row(y + i, count, [&](V term) { return term * factor; }, Kept<A>{kept.terms.get() + i});
      } else {
        const V m = splat<V>(A(s.sum == 0 ? 0 : s.m)), factor = splat<V>(A(scale));
        map_row(y + i, count, [&](V v) { return logits.term(v, m) * factor; }, x + i);
      }
    }
  });
}

template <class T, class Team>
inline void log_softmax_row(Team team, const T* x, T* y, int64_t n, const Logits<T, false>& logits) {
  using A = Acc<T>;
  using V = Vec<T>;
  const A reference = row_reference(x, n, -1, logits);
  const BlockSum s = row_sums(team, n, logits, [&](int64_t begin, int64_t end) {
    return block_exp_sum(x + begin, end - begin, -1, reference, logits);
  });
  const V m = splat<V>(A(s.sum == 0 ? 0 : s.m)), log_sum = splat<V>(A(s.sum == 0 ? 0 : std::log(s.sum)));
  for_parts(team, n, kBlock, [&](int64_t begin, int64_t end) {
    map_row(y + begin, end - begin, [&](V v) { return (v - m) - log_sum; }, x + begin);
  });
}

// Log-softmax backward is g - p Σ g with p = exp(y), and 0 where y is -inf. Of the p next to 1 the difference would be
// rounding: there it is g q - p Σ of the other g, where q = 1 - p is Σ of the other p.
template <class T>
struct LogSoftmaxGradient {
  using V = Vec<T>;
  const Logits<T, false>& logits;
  V all = {}, others = {}, lacking = {};  // Σ g; without the p next to 1, Σ g and Σ p

  static auto is_next_to_one(V y) { return y > Acc<T>(kNextToOne); }
  static V counted(V y, V g) { return y == splat<V>(-std::numeric_limits<Acc<T>>::infinity()) ? V{} : g; }
  static V other_g(V y, V g) { return is_next_to_one(y) ? V{} : counted(y, g); }
  V p(V y) const { return logits.term(y, V{}); }
  V other_p(V y) const { return is_next_to_one(y) ? V{} : p(y); }

  V operator()(V y, V g) const { return counted(y, g) - p(y) * all; }
  V exact(V y, V g) const {
    const V of_one = rounded_product(g, lacking) - p(y) * others;
    return is_next_to_one(y) ? of_one : (*this)(y, g);
  }
};

template <class T, class Team>
inline void log_softmax_bwd_row(Team team, T* out, const T* y, const T* g, int64_t n, const Logits<T, false>& logits) {
  using A = Acc<T>;
  using V = Vec<T>;
  LogSoftmaxGradient<T> gradient = {logits};
  struct Sums {
    double all, largest_y;
  };
  const V low = splat<V>(-std::numeric_limits<A>::infinity());
  const auto of_block = [&](int64_t begin, int64_t end) {
    V all[2] = {}, largest[2] = {low, low};
    const auto add = [&](int, int64_t, auto yv, auto gv) {
      all[0] += gradient.counted(yv.a, gv.a), all[1] += gradient.counted(yv.b, gv.b);
      largest[0] = vmax(yv.a, largest[0]), largest[1] = vmax(yv.b, largest[1]);
    };
    for_pairs<2>(end - begin, low[0], add, y + begin, g + begin);
    return Sums{double(reduce_add(all[0] + all[1])), double(reduce_max(vmax(largest[0], largest[1])))};
  };
  const Sums sums = reduce_row(team, n, kSumBlock, Sums{0, low[0]}, of_block, [](const Sums& a, const Sums& b) {
    return Sums{a.all + b.all, std::max(a.largest_y, b.largest_y)};
  });
  gradient.all = splat<V>(A(sums.all));
  const bool has_one = sums.largest_y > kNextToOne;
  if (has_one) {
    const auto sum_of = [&](const auto& f) { return splat<V>(A(sum_row(team, n, f, y, g))); };
    gradient.others = sum_of([&](V yv, V gv) { return gradient.other_g(yv, gv); });
    gradient.lacking = sum_of([&](V yv, V) { return gradient.other_p(yv); });
  }
  for_parts(team, n, kBlock, [&](int64_t begin, int64_t end) {
    const auto exact = [&](V yv, V gv) { return gradient.exact(yv, gv); };
    if (has_one) map_row(out + begin, end - begin, exact, y + begin, g + begin);
    else map_row(out + begin, end - begin, gradient, y + begin, g + begin);
  });
}

template <class T>
[[gnu::flatten]] inline void log_softmax_bwd_lanes(const Vec<T>* y, Vec<T>* g, int64_t n,
                                                   const Logits<T, false>& logits) {
  using V = Vec<T>;
  LogSoftmaxGradient<T> gradient = {logits};
  V largest = y[0];
  for (int64_t c = 1; c < n; ++c) largest = vmax(y[c], largest);
  gradient.all = sum_in_lanes<T>(n, [&](int64_t c) { return gradient.counted(y[c], g[c]); });
  if (!any_lane(gradient.is_next_to_one(largest))) {
    for (int64_t c = 0; c < n; ++c) g[c] = gradient(y[c], g[c]);
    return;
  }
  gradient.others = sum_in_lanes<T>(n, [&](int64_t c) { return gradient.other_g(y[c], g[c]); });
  gradient.lacking = sum_in_lanes<T>(n, [&](int64_t c) { return gradient.other_p(y[c]); });
  for (int64_t c = 0; c < n; ++c) g[c] = gradient.exact(y[c], g[c]);
}

template <class T>
inline bool takes_lanes(const RowMapParams& p) {
  return p.rows.n <= kMostInLanes || takes_lanes_of_columns<T>(p.rows, p.output_rows);
}

// Rows in lanes. Those of more than kMostInLanes elements get the bits that the row walk gives them.
static_assert(kMostInColumns <= kBlock && kMostInColumns <= kSumBlock);  // to the row walk they are one block
template <bool kLog, class T>
inline void softmax_lanes(const RowMapParams& p, int64_t begin, int64_t end) {
  using A = Acc<T>;
  using V = Vec<T>;
  const int64_t n = p.rows.n;
  const Logits<T, false> logits(LogitTransform{});
  const V low = splat<V>(-std::numeric_limits<A>::infinity());
  const bool one_run = has_one_stride(p.rows) && has_one_stride(p.output_rows), is_short = n <= kMostInLanes;
  V z[kMostInColumns];
  for_each_lanes<Accumulate<T>::kLanes>(p.rows, one_run, begin, end, [&](int64_t, int64_t count, Position at) {
    const T* const x = static_cast<const T*>(p.input) + at.in(p.rows);
    const auto max_of = [&](int64_t count) {
      V max = low;
      for (int64_t c = 0; c < count; ++c) max = vmax(z[c], max);  // NaN aside
      return max;
    };
    // Σ of the terms, which take the place of the logits; for log-softmax, the differences from m do.
    const auto sum_about = [&](V m) {
      const auto term_of = [&](int64_t c) {
        const V term = logits.term(z[c], m);
        z[c] = kLog ? z[c] - m : term;
        return term;
      };
      if (!is_short) return lanes_exp_sum<T>(n, term_of);
      V sum = {};
      for (int64_t c = 0; c < n; ++c) sum += term_of(c);
      return sum;
    };
    load_lanes(x, p.rows, n, count, z);
    V max = max_of(std::min(n, kReference)), m = chosen(max > low, max), sum = sum_about(m);
    const auto is_far = (max == low) | (sum > A(kLargestSum));
    if (n > kReference && any_lane(is_far)) {
      load_lanes(x, p.rows, n, count, z);
      max = is_far ? max_of(n) : max;
      m = chosen(max > low, max);
      sum = sum_about(m);
    }
    V scale = V{};
    if (!kLog) scale = splat<V>(1) / sum;
    else if (is_short) scale = log2(sum) * kLn2<A>;
    else
      for (int k = 0; k < count; ++k) scale[k] = A(std::log(double(sum[k])));
    scale = chosen(sum != V{}, scale);
    for (int64_t c = 0; c < n; ++c) z[c] = kLog ? z[c] - scale : z[c] * scale;
    store_lanes(static_cast<T*>(p.output) + at.in(p.output_rows), p.output_rows, n, count, z);
  });
}

template <class T>
void softmax_fwd(const RowMapParams& p, int64_t begin, int64_t end) {
  const int64_t n = p.rows.n;
  if (takes_lanes<T>(p)) return softmax_lanes<false, T>(p, begin, end);
  const Logits<T, false> logits(LogitTransform{});
  const KeptTerms<Acc<T>> kept(keeps_terms<T>(n) ? n : 0);
  for_forward_rows<T>(p, begin, end, [&](auto team, int64_t first, int64_t last, const auto& y, const auto& x) {
    for (int64_t i = first; i < last; ++i) softmax_row(team, x(i), y(i), n, logits, kept);
  });
}
template <class T>
void log_softmax_fwd(const RowMapParams& p, int64_t begin, int64_t end) {
  if (takes_lanes<T>(p)) return softmax_lanes<true, T>(p, begin, end);
  const Logits<T, false> logits(LogitTransform{});
  for_forward_rows<T>(p, begin, end, [&](auto team, int64_t first, int64_t last, const auto& y, const auto& x) {
    for (int64_t i = first; i < last; ++i) log_softmax_row(team, x(i), y(i), p.rows.n, logits);
  });
}

template <class T>
void softmax_bwd(const RowMapParams& p, int64_t begin, int64_t end) {
  if (takes_backward_lanes<T>(p)) {
    return for_backward_lanes<T>(p, begin, end, [&](int64_t, int64_t, Vec<T>* y, Vec<T>* g) {
      weighted_bwd_lanes<T>(y, g, p.output_rows.n, [&](Vec<T> v) { return v; });
    });
  }
  for_each_backward_row<T>(p, begin, end, [&](auto team, int64_t, T* out, const T* output, const T* g) {
    weighted_bwd_row(team, out, output, g, p.output_rows.n, [&](Vec<T> v) { return v; });
  });
}
template <class T>
void log_softmax_bwd(const RowMapParams& p, int64_t begin, int64_t end) {
  const Logits<T, false> logits(LogitTransform{});
  if (takes_backward_lanes<T>(p)) {
    return for_backward_lanes<T>(p, begin, end, [&](int64_t, int64_t, const Vec<T>* y, Vec<T>* g) {
      log_softmax_bwd_lanes<T>(y, g, p.output_rows.n, logits);
    });
  }
  for_each_backward_row<T>(p, begin, end, [&](auto team, int64_t, T* out, const T* output, const T* g) {
    log_softmax_bwd_row(team, out, output, g, p.output_rows.n, logits);
  });
}

void softmax_fwd_rows(const RowMapParams& p, int64_t begin, int64_t end) {
  TSE_BY_DTYPE(p.dtype, softmax_fwd, p, begin, end)
}
void softmax_bwd_rows(const RowMapParams& p, int64_t begin, int64_t end) {
  TSE_BY_DTYPE(p.dtype, softmax_bwd, p, begin, end)
}
void log_softmax_fwd_rows(const RowMapParams& p, int64_t begin, int64_t end) {
  TSE_BY_DTYPE(p.dtype, log_softmax_fwd, p, begin, end)
}
void log_softmax_bwd_rows(const RowMapParams& p, int64_t begin, int64_t end) {
  TSE_BY_DTYPE(p.dtype, log_softmax_bwd, p, begin, end)
}
#endif
