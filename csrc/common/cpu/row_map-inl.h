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
  return {mean, sums.largest > sums.of_weights * (63.0 / 64) ? mean_of(sums_about(mean)) : A(0)};
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
