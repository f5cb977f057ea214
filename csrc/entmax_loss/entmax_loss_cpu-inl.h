// Rows of the losses of sparsemax and entmax on the CPU. [per ISA]
//
// The map runs on a few rows at a time; from its probabilities, which stay in cache, come loss and gradient.
#if defined(TSE_ENTMAX_LOSS_CPU_INL_H) == defined(TSE_ISA_TOGGLE)
#ifdef TSE_ENTMAX_LOSS_CPU_INL_H
#undef TSE_ENTMAX_LOSS_CPU_INL_H
#else
#define TSE_ENTMAX_LOSS_CPU_INL_H
#endif
#include "common/cpu/math-inl.h"
#include "common/cpu/staged_rows-inl.h"

// w = (1 - p^c) / c of p > 0, else 0; -log p for c = 0.
template <class A>
struct Surprise {
  using V = Vec<A>;
  A c;
  bool is_linear, is_root;
  explicit Surprise(double alpha) : c(A(alpha - 1)), is_linear(alpha == 2), is_root(alpha == 1.5) {}

  V of(V p) const {
    V w;
    if (is_linear) w = A(1) - p;
    else if (is_root) w = A(2) - A(2) * vsqrt(p);
    else w = any(p);
    return p <= A(0) ? V{} : w;
  }
  A of(A p) const { return of(splat<V>(p))[0]; }

 private:
  // -log p · (e^t - 1) / t, t = c log p: near t = 0 by the series, whose last term is below a rounding.
  V any(V p) const {
    constexpr int kTerms = std::is_same_v<A, double> ? 15 : 8;
    const V log_p = log2(p) * kLn2<A>, t = log_p * c;
    V series = {};
    for (int k = kTerms; k > 0; --k) series = (series * t + A(1)) / A(k);
    const V exact = (exp2<A>(t * kLog2e<A>) - A(1)) / t;
    return -log_p * (vmax(t, -t) < A(0.5) ? series : exact);
  }
};

template <class A>
struct LossRow {
  const A* x;
  A* p;  // probabilities; may be overwritten
  const A* y;  // a distribution, or nullptr
  int64_t n, own;  // own: the target's class, -1 with a distribution
};

// Σ of t, of t (x - r) and of t w(t), for the probabilities or the distribution t.
struct LossSums {
  double mass, linear, surprise;
};
template <class A, class Team>
[[gnu::flatten]] inline LossSums loss_sums(Team team, const A* t, const A* x, int64_t n, A r,
                                           const Surprise<A>& surprise) {
  using V = Vec<A>;
  const V reference = splat<V>(r);
  const auto of_block = [&](int64_t begin, int64_t end) {
    V mass[2] = {}, linear[2] = {}, weighted[2] = {};
    const auto add = [&](int k, V v, V logit) {
      if (mask_above(v, A(0)) == 0) return;  // NaN is above
      mass[k] += v, weighted[k] += v * surprise.of(v);
      linear[k] += v == V{} ? V{} : v * (logit - reference);  // of a logit of -inf, too
    };
    const auto add_pair = [&](int, int64_t, auto v, auto logit) { add(0, v.a, logit.a), add(1, v.b, logit.b); };
    for_pairs<2>(end - begin, A(0), add_pair, t + begin, x + begin);
    return LossSums{double(reduce_add(mass[0] + mass[1])), double(reduce_add(linear[0] + linear[1])),
                    double(reduce_add(weighted[0] + weighted[1]))};
  };
  return reduce_row(team, n, kSumBlock, LossSums{0, 0, 0}, of_block, [](const LossSums& a, const LossSums& b) {
    return LossSums{a.mass + b.mass, a.linear + b.linear, a.surprise + b.surprise};
  });
}

// The loss of a row, from its probabilities; overwrites that of the own class by 0. others: Σ p without it.
template <class A, class Team>
inline double row_loss(Team team, const LossRow<A>& row, double alpha, double* others) {
  const Surprise<A> surprise(alpha);
  const bool has_class = row.own >= 0;
  const A own_p = has_class ? std::exchange(row.p[row.own], A(0)) : A(0);
  const A r = has_class ? row.x[row.own] : block_max(row.x, row.n);
  const LossSums p = loss_sums(team, row.p, row.x, row.n, r, surprise);
  *others = p.mass;
  const double own_mass = double(own_p), mass = p.mass + own_mass;
  if (!(mass > 0)) return std::numeric_limits<double>::quiet_NaN();  // of -inf alone, or with NaN
  const double infinity = std::numeric_limits<double>::infinity();
  if (r == -std::numeric_limits<A>::infinity() || p.linear == infinity) return infinity;
  const double sum = p.surprise + own_mass * double(surprise.of(own_p));
  // w + (x - r) is the same number on the support: what a rounding of Σ p is worth.
  const double level = p.linear + sum;
  double loss = p.linear + sum / alpha - (mass - 1) * (level - 1 / alpha);
  if (!has_class) {
    const LossSums y = loss_sums(team, row.y, row.x, row.n, r, surprise);
    loss += level * (y.mass - 1) - y.linear - y.surprise / alpha;
  }
  return loss < 0 ? 0 : loss;  // NaN stays
}

// out = g (p - y); the own class's is g times what its probability lacks to 1.
template <class A, class Team>
inline void write_gradient(Team team, const LossRow<A>& row, A* out, double g, double others) {
  using V = Vec<A>;
  const V factor = splat<V>(A(g));
  for_parts(team, row.n, kSumBlock, [&](int64_t begin, int64_t end) {
    const A *p = row.p + begin, *y = row.y + begin;
    if (row.y == nullptr) map_row(out + begin, end - begin, [&](V pv) { return pv * factor; }, p);
    else map_row(out + begin, end - begin, [&](V pv, V yv) { return (pv - yv) * factor; }, p, y);
  });
  if (row.own >= 0) out[row.own] = A(-others * g);
}

template <class A>
inline void loss_rows(const EntmaxLossParams& p, int64_t begin, int64_t end) {
  const int64_t n = p.map.rows.n, most = std::min(p.map.rows.inner, end - begin);
  const bool has_gradient = p.map.grad_input != nullptr, has_distribution = p.target == nullptr;
  const StagedRows<A> x(p.map.input, p.map.rows, p.dtype, most);
  const StagedRows<A> y(p.distribution, p.distribution_rows, p.dtype, most);
  const StagedRows<A> out(p.map.grad_input, p.map.grad_input_rows, p.dtype, most);
  const Tile<A> probabilities(n, most, kStaged);
  for_runs(p.map.rows, begin, end, probabilities.rows, [&](int64_t first, int64_t count) {
    x.read(first, count);
    if (has_distribution) y.read(first, count);
    RowMapParams map = p.map;
    map.rows = x.shape(count);
    map.input = x.first(first);
    map.output_rows = {1, n, count, 0, 1, probabilities.stride};
    map.output = probabilities.first();
    map.first_row = first;
    map.share_row = p.share_row;
    p.probabilities(map, 0, count);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t row = first + i;
      const int64_t target = has_distribution    ? -1
                             : p.target_is_int32 ? static_cast<const int32_t*>(p.target)[row]
                                                 : static_cast<const int64_t*>(p.target)[row];
      const bool counts = has_distribution || target != p.ignore_index;
      const LossRow<A> r = {
          x.first(first) + i * map.rows.stride_inner, probabilities.first() + i * probabilities.stride,
          has_distribution ? y.first(first) + i * y.shape(count).stride_inner : nullptr, n, counts ? target : -1};
      A* const to = has_gradient ? out.first(first) + i * out.shape(count).stride_inner : nullptr;
      with_team(p.share_row, [&](auto team) {
        double others = 0;
        const double loss = counts ? row_loss(team, r, p.map.alpha(row), &others) : 0;
        if (p.row_loss != nullptr) static_cast<A*>(p.row_loss)[row] = A(loss);
        if (!has_gradient) return;
        if (!counts) return void(std::fill_n(to, n, A(0)));
        const double g = double(static_cast<const A*>(p.grad_output)[row * p.grad_output_stride]);
        write_gradient(team, r, to, double(A(g / p.divisor)), others);
      });
    }
    if (has_gradient) out.write(first, count);
  });
}

void entmax_loss_rows(const EntmaxLossParams& p, int64_t begin, int64_t end) {
  p.map.dtype == DType::kFloat64 ? loss_rows<double>(p, begin, end) : loss_rows<float>(p, begin, end);
}
#endif
