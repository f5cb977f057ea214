// How the rows of a map reach its functions: contiguous, for one thread or shared by all. [per ISA]
#if defined(TSE_ROW_MAP_INL_H) == defined(TSE_ISA_TOGGLE)
#ifdef TSE_ROW_MAP_INL_H
#undef TSE_ROW_MAP_INL_H
#else
#define TSE_ROW_MAP_INL_H
#endif
#include "common/cpu/rows-inl.h"

// Calls f(team, first, last, y, x): rows x(i) to y(i), first <= i < last.
template <class T, class F>
inline void for_forward_rows(const RowMapParams& p, int64_t begin, int64_t end, const F& f) {
  const auto rows = [&](int64_t first, int64_t last, const auto& y, const auto& x) {
    with_team(p.share_row, [&](auto team) { f(team, first, last, y, x); });
  };
  for_each_row(begin, end, rows, RowAt<T>{static_cast<T*>(p.output), p.output_rows},
               RowAt<const T>{static_cast<const T*>(p.input), p.rows});
}

// Calls f(team, i, out, output, grad_output) for each row i.
template <class T, class F>
inline void for_each_backward_row(const RowMapParams& p, int64_t begin, int64_t end, const F& f) {
  const auto rows = [&](int64_t first, int64_t last, const auto& out, const auto& output, const auto& g) {
    with_team(p.share_row, [&](auto team) {
      for (int64_t i = first; i < last; ++i) f(team, i, out(i), output(i), g(i));
    });
  };
  for_each_row(begin, end, rows, RowAt<T>{static_cast<T*>(p.grad_input), p.grad_input_rows},
               RowAt<const T>{static_cast<const T*>(p.output), p.output_rows},
               RowAt<const T>{static_cast<const T*>(p.grad_output), p.grad_output_rows});
}

// Σ s g / Σ s of a row, s = weight(p). Where one s is nearly the sum of all, its g is nearly the mean, and the
// difference of the two would be rounding: the mean is then the sum of two numbers, the second one the mean of what is
// left of g.
template <class A>
struct Mean {
  A hi, lo;
};
template <class A>
constexpr A kNearlyAll = A(63.0 / 64);  // of Σ s: if one s is more, there are two numbers
template <class T, class Team, class Weight>
inline Mean<Acc<T>> weighted_mean(Team team, const T* p, const T* g, int64_t n, const Weight& weight) {
  using A = Acc<T>;
  using V = Vec<T>;
  struct Sums {
    double of_g, of_weights, largest;
  };
  const auto sums_about = [&](A mean) {
    const V m = splat<V>(mean);
    const auto of_block = [&](int64_t begin, int64_t end) {
      V of_g[2] = {}, of_weights[2] = {}, largest[2] = {};
      const auto add = [&](int, int64_t, auto pv, auto gv) {
        const V a = weight(pv.a), b = weight(pv.b);
        of_g[0] += chosen(a != V{}, a * (gv.a - m)), of_g[1] += chosen(b != V{}, b * (gv.b - m));
        of_weights[0] += a, of_weights[1] += b;
        largest[0] = vmax(a, largest[0]), largest[1] = vmax(b, largest[1]);
      };
      for_pairs<2>(end - begin, A(0), add, p + begin, g + begin);
      return Sums{double(reduce_add(of_g[0] + of_g[1])), double(reduce_add(of_weights[0] + of_weights[1])),
                  double(reduce_max(vmax(largest[0], largest[1])))};
    };
    return reduce_row(team, n, kSumBlock, Sums{0, 0, 0}, of_block, [](const Sums& a, const Sums& b) {
      return Sums{a.of_g + b.of_g, a.of_weights + b.of_weights, std::max(a.largest, b.largest)};
    });
  };
  const auto mean_of = [](const Sums& s) { return A(s.of_weights == 0 ? 0 : s.of_g / s.of_weights); };
  const Sums sums = sums_about(A(0));
  const A mean = mean_of(sums);
  const bool has_one = A(sums.largest) > A(sums.of_weights) * kNearlyAll<A>;
  return {mean, has_one ? mean_of(sums_about(mean)) : A(0)};
}

// Whether rows that are not contiguous are walked in lanes. Of few long ones most lanes would be empty.
template <class T, class... R>
inline bool takes_lanes_of_columns(const Rows& rows, const R&... others) {
  const bool contiguous = rows.stride_n == 1 && ((others.stride_n == 1) && ...);
  const bool fills_lanes = rows.inner >= Accumulate<T>::kLanes;
  return !contiguous && rows.n <= (fills_lanes ? kMostInColumns : kMostInLanes);
}
template <class T>
inline bool takes_backward_lanes(const RowMapParams& p) {
  return takes_lanes_of_columns<T>(p.output_rows, p.grad_output_rows, p.grad_input_rows);
}

// Calls f(row, count, y, g) for rows of up to kMostInColumns elements, one in each lane: `count` of them, the first of
// which is `row`. f makes the gradients of the output y and of grad_output g, in g.
template <class T, class F>
inline void for_backward_lanes(const RowMapParams& p, int64_t begin, int64_t end, const F& f) {
  const int64_t n = p.output_rows.n;
  const bool one_run =
      has_one_stride(p.output_rows) && has_one_stride(p.grad_output_rows) && has_one_stride(p.grad_input_rows);
  Vec<T> y[kMostInColumns], g[kMostInColumns];
  for_each_lanes<Accumulate<T>::kLanes>(
      p.output_rows, one_run, begin, end, [&](int64_t row, int64_t count, Position at) {
        load_lanes(static_cast<const T*>(p.output) + at.in(p.output_rows), p.output_rows, n, count, y);
        load_lanes(static_cast<const T*>(p.grad_output) + at.in(p.grad_output_rows), p.grad_output_rows, n, count, g);
        f(row, count, y, g);
        store_lanes(static_cast<T*>(p.grad_input) + at.in(p.grad_input_rows), p.grad_input_rows, n, count, g);
      });
}

// Σ term(c) in each lane, added in the order in which for_pairs<2> adds a row: with the same bits.
template <class T, class F>
[[gnu::always_inline]] inline Vec<T> sum_in_lanes(int64_t n, const F& term) {
  constexpr int kLanes = Accumulate<T>::kLanes, kPair = 2 * kLanes;
  Vec<T> sums[kPair] = {};
  for (int64_t first = 0; first < std::min<int64_t>(n, kPair); ++first) {
    Vec<T> sum = term(first);
    for (int64_t c = first + kPair; c < n; c += kPair) sum += term(c);
    sums[slot_of<T>(int(first))] = sum;
  }
  for (int half = kLanes; half > 0; half /= 2)
    for (int k = 0; k < half; ++k) sums[k] += sums[k + half];
  return sums[0];
}

// As weighted_bwd_row, of the rows in the lanes; overwrites the probabilities p by their weights.
template <class T, class Weight>
[[gnu::flatten]] inline void weighted_bwd_lanes(Vec<T>* p, Vec<T>* g, int64_t n, const Weight& weight) {
  using V = Vec<T>;
  V largest = {};
  for (int64_t c = 0; c < n; ++c) {
    p[c] = weight(p[c]);
    largest = vmax(p[c], largest);
  }
  const V sum = sum_in_lanes<T>(n, [&](int64_t c) { return p[c]; });
  const auto mean_about = [&](V m) {
    const V of_g = sum_in_lanes<T>(n, [&](int64_t c) { return chosen(p[c] != V{}, p[c] * (g[c] - m)); });
    return chosen(sum != V{}, of_g / sum);
  };
  const V hi = mean_about(V{});
  const auto has_one = largest > sum * kNearlyAll<Acc<T>>;
  const V lo = any_lane(has_one) ? chosen(has_one, mean_about(hi)) : V{};
  for (int64_t c = 0; c < n; ++c) g[c] = chosen(p[c] != V{}, p[c] * ((g[c] - hi) - lo));
}

// The gradient of every map but log-softmax: s (g - mean), where s = weight(p) is p^(2 - alpha) on the support.
template <class T, class Team, class Weight>
inline void weighted_bwd_row(Team team, T* out, const T* p, const T* g, int64_t n, const Weight& weight) {
  using V = Vec<T>;
  const auto mean = weighted_mean(team, p, g, n, weight);
  const V hi = splat<V>(mean.hi), lo = splat<V>(mean.lo);
  for_parts(team, n, kSumBlock, [&](int64_t begin, int64_t end) {
    const auto gradient = [&](V pv, V gv) {
      const V s = weight(pv);
      return chosen(s != V{}, s * ((gv - hi) - lo));  // 0 outside the support, even where g is infinite
    };
    map_row(out + begin, end - begin, gradient, p + begin, g + begin);
  });
}
#endif
