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
  // Of the target's probability, which is most of a small loss.
  double of(A p) const {
    if (p <= 0) return 0;
    const double log_p = std::log(double(p)), t = double(c) * log_p;
    return std::abs(t) < 1e-12 ? -log_p : -std::expm1(t) / double(c);
  }

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

struct LossSums {
  double others, surprise, of_target, largest;  // Σ p without the own class, Σ p w, Σ of a distribution, max p
};

// The sums of a row, all of the own class aside.
template <class A, class Team>
[[gnu::flatten]] inline LossSums sums_of(Team team, const LossRow<A>& row, const Surprise<A>& surprise) {
  using V = Vec<A>;
  const auto of_block = [&](int64_t begin, int64_t end) {
    V others[2] = {}, weighted[2] = {}, largest[2] = {};
    const auto add = [&](int k, V p) {
      if (mask_above(p, A(0)) == 0) return;  // NaN is above
      others[k] += p, weighted[k] += p * surprise.of(p);
      largest[k] = vmax(p, largest[k]);
    };
    for_pairs<2>(end - begin, A(0), [&](int, int64_t, auto v) { add(0, v.a), add(1, v.b); }, row.p + begin);
    return LossSums{double(reduce_add(others[0] + others[1])), double(reduce_add(weighted[0] + weighted[1])), 0,
                    double(reduce_max(vmax(largest[0], largest[1])))};
  };
  return reduce_row(team, row.n, kSumBlock, LossSums{0, 0, 0, 0}, of_block, [](const LossSums& a, const LossSums& b) {
    return LossSums{a.others + b.others, a.surprise + b.surprise, 0, std::max(a.largest, b.largest)};
  });
}

// Σ y (s + d - (1 - y^c) / (c alpha)) of a distribution; where y is 0, so is the term, whatever the logit.
template <class A, class Team>
[[gnu::flatten]] inline double distribution_sum(Team team, const LossRow<A>& row, A max, A s, A alpha,
                                                const Surprise<A>& surprise) {
  using V = Vec<A>;
  const V m = splat<V>(max), shift = splat<V>(s), inverse = splat<V>(1 / alpha);
  const auto term = [&](V y, V x) {
    const V of_y = y * ((shift + (m - x)) - surprise.of(y) * inverse);
    return y == V{} ? V{} : of_y;
  };
  return sum_row(team, row.n, term, row.y, row.x);
}

// The loss of a row, from its probabilities; overwrites that of the own class by 0. others: Σ p without it.
template <class A, class Team>
inline double row_loss(Team team, const LossRow<A>& row, double alpha, double* others) {
  const Surprise<A> surprise(alpha);
  const double part = (alpha - 1) / alpha;
  A own_p = 0;
  if (row.own >= 0) own_p = std::exchange(row.p[row.own], A(0));
  if (own_p < std::numeric_limits<A>::min()) own_p = 0;  // its logarithm would have no digits
  const LossSums sums = sums_of(team, row, surprise);
  *others = sums.others;
  if (sums.others != sums.others || own_p != own_p) return std::numeric_limits<double>::quiet_NaN();
  const double own_surprise = surprise.of(own_p);
  const double all = part * (sums.surprise + double(own_p) * own_surprise);
  if (row.own >= 0 && own_p > 0) return std::max(0.0, own_surprise - all);
  const A max = block_max(row.x, row.n), s = A(surprise.of(A(sums.largest)));
  if (sums.largest == 0) return std::numeric_limits<double>::quiet_NaN();  // of -inf alone
  if (row.own >= 0) return double(s) + (double(max) - double(row.x[row.own])) - all;
  const double loss = distribution_sum(team, row, max, s, A(alpha), surprise) - all;
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
