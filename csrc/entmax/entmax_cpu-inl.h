// Entmax rows on the CPU: entmax15, and entmax with an alpha for each row. [per ISA]
//
// The mathematics is in entmax_policy-inl.h. Short rows are searched together, one in each lane. Of a long row Newton's
// steps begin at the t of its parts' largest elements alone, which is an upper bound; elements whose p is 0 there are
// not looked at again. From memory a row is read once and written once.
#if defined(TSE_ENTMAX_CPU_INL_H) == defined(TSE_ISA_TOGGLE)
#ifdef TSE_ENTMAX_CPU_INL_H
#undef TSE_ENTMAX_CPU_INL_H
#else
#define TSE_ENTMAX_CPU_INL_H
#endif
#include "common/cpu/collect-inl.h"
#include "common/cpu/row_map-inl.h"
#include "entmax/entmax_search-inl.h"

// ---- one row --------------------------------------------------------------------------------------------------------

struct Sums {
  double f, slope;
};
inline Sums joined(Sums a, Sums b) { return {a.f + b.f, a.slope + b.slope}; }

// v of a row's elements, at t = hi + lo.
template <class T>
struct Shift {
  Vec<T> max, c, hi, lo;
  Shift(Acc<T> max, Vec<T> c, double hi, double lo)
      : max(splat<Vec<T>>(max)),
        c(c),
        hi(splat<Vec<T>>(Acc<T>(hi))),
        lo(splat<Vec<T>>(Acc<T>((hi - double(Acc<T>(hi))) + lo))) {}
  Vec<T> operator()(Vec<T> x) const { return (hi - c * (max - x)) + lo; }
};

// Σ p and Σ p^(2 - alpha) of a row, of T or of what was kept of one.
template <class X, class T, class Policy, class Team>
[[gnu::flatten]] inline Sums sums_at(Team team, const X* x, int64_t n, const Shift<T>& shift, const Policy& policy) {
  using V = Vec<T>;
  const Acc<T> low = -std::numeric_limits<Acc<T>>::infinity();
  const auto of_block = [&](int64_t begin, int64_t end) {
    V f[2] = {}, slope[2] = {};
    const auto add = [&](int k, V v) {
      if (Policy::kIsCostly && mask_above(v, policy.origin[0]) == 0) return;
      const Terms<V> terms = policy.terms(v);
      f[k] += terms.p, slope[k] += terms.slope;
    };
    for_pairs<2>(end - begin, low, [&](int, int64_t, auto v) { add(0, shift(v.a)), add(1, shift(v.b)); }, x + begin);
    return Sums{double(reduce_add(f[0] + f[1])), double(reduce_add(slope[0] + slope[1]))};
  };
  return reduce_row(team, n, kSumBlock, Sums{0, 0}, of_block, joined);
}

template <class X, class T, class Policy, class Team>
inline void search_row(Team team, const X* x, int64_t n, Acc<T> max, const Policy& policy, Search<double>& search,
                       double tolerance) {
  for (int count = 1; search.goes_on; ++count) {
    const Sums s = sums_at(team, x, n, Shift<T>(max, policy.c, search.hi, search.lo), policy);
    const bool bisects = policy.is_steep()[0] && count % 4 == 0;  // steps of a vertical curve may be tiny
    search.step(policy, s.f, s.slope, double(policy.c[0]), bisects, tolerance);
  }
}

// Parts of a row, and the largest element of each lane of each part: NaN where there is one.
constexpr int64_t kPart = 256;
template <class T, class Team>
inline void maxima_of_parts(Team team, const T* x, int64_t n, Acc<T>* maxima) {
  constexpr int kLanes = Accumulate<T>::kLanes;
  const Vec<T> low = splat<Vec<T>>(-std::numeric_limits<Acc<T>>::infinity());
  for_parts(team, n, kPart, [&](int64_t first, int64_t last) {
    for (int64_t begin = first; begin < last; begin += kPart) {
      Vec<T> m[4] = {low, low, low, low};
      auto is_nan = low != low;
      const auto add = [&](int k, int64_t, auto v) {
        m[k] = vmax(v.a, m[k]), m[k + 1] = vmax(v.b, m[k + 1]);
        is_nan |= (v.a != v.a) | (v.b != v.b);
      };
      for_pairs<4>(std::min(kPart, last - begin), low[0], add, x + begin);
      const Vec<T> largest = vmax(vmax(m[0], m[1]), vmax(m[2], m[3]));
      store(maxima + begin / kPart * kLanes, is_nan ? low - low : largest);
    }
  });
}

// Room for what long rows are searched in, for one thread.
template <class A>
struct EntmaxScratch {
  static constexpr int64_t kMost = 65536;  // elements kept
  const int64_t room;
  const std::unique_ptr<A[]> maxima, kept;
  explicit EntmaxScratch(int64_t n)
      : room(std::min(n, kMost)), maxima(new A[(n / kPart + 1) * kFloats]), kept(new A[room + kPart + 2 * kFloats]) {}

  // Keeps the elements of a row that are not <= bound, and returns their number; -1: there are too many.
  template <class T>
  int64_t keep(const T* x, int64_t n, A bound) const {
    constexpr int kLanes = Accumulate<T>::kLanes;
    int64_t count = 0;
    for (int64_t begin = 0, lanes = 0; begin < n; begin += kPart, lanes += kLanes) {
      if (mask_above(load(&maxima[lanes]), bound) == 0) continue;
      if (count > room) return -1;
      count += collect_above<false>(x, begin, std::min(begin + kPart, n), bound, &kept[count]);
    }
    return count;
  }
};

template <class T, class Policy, class Team>
inline void entmax_row(Team team, const T* x, T* y, int64_t n, const Policy& policy, const EntmaxScratch<Acc<T>>& s) {
  using A = Acc<T>;
  using V = Vec<T>;
  const double c = double(policy.c[0]), origin = double(policy.origin[0]);
  const double one = 1 + origin, of_equal = double(policy.of_equal[0]);
  maxima_of_parts(team, x, n, s.maxima.get());
  const int64_t maxima = (n + kPart - 1) / kPart * Accumulate<T>::kLanes;
  const A largest = block_max(s.maxima.get(), maxima),
          max = largest > -std::numeric_limits<A>::infinity() ? largest : 0;
  Search<double> rough(one, one, of_equal);
  search_row<A, T>(Alone{}, s.maxima.get(), maxima, max, policy, rough, /*tolerance=*/0.1);
  Search<double> search(rough.hi, one, of_equal);
  int64_t kept = -1;
  if (c > 0) {
    const double edge = double(max) - (rough.hi - origin) / c;
    const A bound = A(edge - std::abs(edge) * std::numeric_limits<A>::epsilon() * 2);
    int64_t above = 0;
    for (int64_t i = 0; i < maxima; ++i) above += s.maxima[i] > bound;
    if (above < maxima / 2) kept = s.keep(x, n, bound);
  }
  const A tolerance = kSumTolerance<A>;
  if (kept >= 0) search_row<A, T>(team, s.kept.get(), kept, max, policy, search, tolerance);
  else search_row<T, T>(team, x, n, max, policy, search, tolerance);

  const Shift<T> shift(max, policy.c, search.hi, search.lo);
  const V scale = splat<V>(policy.is_steep()[0] ? A(1 / sums_at(team, x, n, shift, policy).f) : A(1));
  for_parts(team, n, kSumBlock, [&](int64_t begin, int64_t end) {
    map_row(
        y + begin, end - begin,
        [&](V e) {
          const V v = shift(e);
          if (Policy::kIsCostly && mask_above(v, policy.origin[0]) == 0) return V{};
          return policy.terms(v).p * scale;
        },
        x + begin);
  });
}

// ---- lanes ----------------------------------------------------------------------------------------------------------

// As many rows as a vector has lanes, of up to kMostInLanes elements each; overwrites them.
template <class T, class Policy>
[[gnu::flatten]] inline void entmax_of_lanes(Vec<T>* z, int64_t n, const Policy& policy) {
  using A = Acc<T>;
  using V = Vec<T>;
  const V low = splat<V>(-std::numeric_limits<A>::infinity());
  V max = low;
  for (int64_t i = 0; i < n; ++i) max = vmax(z[i], max);  // NaN aside
  max = max > low ? max : V{};
  for (int64_t i = 0; i < n; ++i) z[i] = policy.c * (max - z[i]);
  const V one = splat<V>(1) + policy.origin;
  Search<V> search(one, one, policy.of_equal);
  V f, scale = splat<V>(1);
  const auto sum = [&] {
    V sums[4] = {}, slopes[4] = {};
    for (int64_t i = 0; i < n; ++i) {
      const Terms<V> terms = policy.terms((search.hi - z[i]) + search.lo);
      sums[i % 4] += terms.p, slopes[i % 4] += terms.slope;
    }
    f = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    return (slopes[0] + slopes[1]) + (slopes[2] + slopes[3]);
  };
  const auto is_steep = policy.is_steep();
  for (int count = 1; any_lane(search.goes_on); ++count) {
    const V slope = sum();
    search.step(policy, f, slope, policy.c, count % 4 == 0 ? is_steep : is_steep & ~is_steep, kSumTolerance<A>);
  }
  if (any_lane(is_steep)) {
    sum();
    scale = is_steep & (f > V{}) ? splat<V>(1) / f : scale;
  }
  for (int64_t i = 0; i < n; ++i) z[i] = policy.terms((search.hi - z[i]) + search.lo).p * scale;
}

// The policies of a call: one for all rows, or one for each.
template <class T, class Policy>
struct Policies {
  const RowMapParams& p;
  const int64_t n;
  const Policy same{splat<Vec<T>>(Acc<T>(p.alpha.same)), n};
  bool is_same() const { return p.alpha.each == nullptr; }

  Policy of_row(int64_t i) const {
    return is_same() ? same : Policy(splat<Vec<T>>(Acc<T>(p.alpha(p.first_row + i))), n);
  }
  Policy of_lanes(int64_t i, int64_t count) const {
    if (is_same()) return same;
    Vec<T> alpha;
    for (int k = 0; k < Accumulate<T>::kLanes; ++k)
      alpha[k] = Acc<T>(p.alpha(p.first_row + i + std::min<int64_t>(k, count - 1)));
    return Policy(alpha, n);
  }
};

template <class T, class Policy>
inline void entmax_lanes(const RowMapParams& p, int64_t begin, int64_t end) {
  const int64_t n = p.rows.n;
  const Policies<T, Policy> policies{p, n};
  const bool one_run = has_one_stride(p.rows) && has_one_stride(p.output_rows);
  Vec<T> z[kMostInLanes];
  for_each_lanes<Accumulate<T>::kLanes>(p.rows, one_run, begin, end, [&](int64_t row, int64_t count, Position at) {
    load_lanes(static_cast<const T*>(p.input) + at.in(p.rows), p.rows, n, count, z);
    entmax_of_lanes<T>(z, n, policies.of_lanes(row, count));
    store_lanes(static_cast<T*>(p.output) + at.in(p.output_rows), p.output_rows, n, count, z);
  });
}

// ---- rows -----------------------------------------------------------------------------------------------------------

template <class T, class Policy>
void fwd_rows_by(const RowMapParams& p, int64_t begin, int64_t end) {
  const int64_t n = p.rows.n;
  if (n <= kMostInLanes) return entmax_lanes<T, Policy>(p, begin, end);
  const Policies<T, Policy> policies{p, n};
  const EntmaxScratch<Acc<T>> scratch(n);
  for_forward_rows<T>(p, begin, end, [&](auto team, int64_t first, int64_t last, const auto& y, const auto& x) {
    for (int64_t i = first; i < last; ++i) entmax_row(team, x(i), y(i), n, policies.of_row(i), scratch);
  });
}

template <class T, class Policy>
void bwd_rows_by(const RowMapParams& p, int64_t begin, int64_t end) {
  const int64_t n = p.output_rows.n;
  const Policies<T, Policy> policies{p, n};
  if (takes_backward_lanes<T>(p)) {
    return for_backward_lanes<T>(p, begin, end, [&](int64_t row, int64_t count, Vec<T>* y, Vec<T>* g) {
      const Policy policy = policies.of_lanes(row, count);
      weighted_bwd_lanes<T>(y, g, n, [&](Vec<T> v) { return policy.weight(v); });
    });
  }
  for_each_backward_row<T>(p, begin, end, [&](auto team, int64_t i, T* out, const T* output, const T* g) {
    const Policy policy = policies.of_row(i);
    weighted_bwd_row(team, out, output, g, n, [&](Vec<T> v) { return policy.weight(v); });
  });
}

// dp/d alpha = s Σ r / Σ s - r, where s is the weight of p and r its alpha_term.
template <class T>
void alpha_bwd(const RowMapParams& p, int64_t begin, int64_t end) {
  using V = Vec<T>;
  const int64_t n = p.output_rows.n;
  const Policies<T, AnyAlpha<T>> policies{p, n};
  with_team(p.share_row, [&](auto team) {
    for (int64_t i = begin; i < end; ++i) {
      const T* const output = static_cast<const T*>(p.output) + row_offset(p.output_rows, i);
      const T* const g = static_cast<const T*>(p.grad_output) + row_offset(p.grad_output_rows, i);
      const auto policy = policies.of_row(i);
      const auto mean = weighted_mean(team, output, g, n, [&](V v) { return policy.weight(v); });
      const V hi = splat<V>(mean.hi), lo = splat<V>(mean.lo);
      const auto term = [&](V pv, V gv) {
        const V r = policy.alpha_term(pv);
        return chosen(r != V{}, r * ((gv - hi) - lo));
      };
      static_cast<double*>(p.grad_input)[i] = -sum_row(team, n, term, output, g);
    }
  });
}

template <class T>
void entmax15_fwd(const RowMapParams& p, int64_t begin, int64_t end) {
  fwd_rows_by<T, Entmax15<T>>(p, begin, end);
}
template <class T>
void entmax15_bwd(const RowMapParams& p, int64_t begin, int64_t end) {
  bwd_rows_by<T, Entmax15<T>>(p, begin, end);
}
void entmax15_fwd_rows(const RowMapParams& p, int64_t begin, int64_t end) {
  TSE_BY_DTYPE(p.dtype, entmax15_fwd, p, begin, end)
}
void entmax15_bwd_rows(const RowMapParams& p, int64_t begin, int64_t end) {
  TSE_BY_DTYPE(p.dtype, entmax15_bwd, p, begin, end)
}

// Half types come as float32 (kWidensHalf).
void entmax_fwd_rows(const RowMapParams& p, int64_t begin, int64_t end) {
  p.dtype == DType::kFloat64 ? fwd_rows_by<double, AnyAlpha<double>>(p, begin, end)
                             : fwd_rows_by<float, AnyAlpha<float>>(p, begin, end);
}
void entmax_bwd_rows(const RowMapParams& p, int64_t begin, int64_t end) {
  p.dtype == DType::kFloat64 ? bwd_rows_by<double, AnyAlpha<double>>(p, begin, end)
                             : bwd_rows_by<float, AnyAlpha<float>>(p, begin, end);
}
void alpha_bwd_rows(const RowMapParams& p, int64_t begin, int64_t end) {
  p.dtype == DType::kFloat64 ? alpha_bwd<double>(p, begin, end) : alpha_bwd<float>(p, begin, end);
}
#endif
