// Rows of the losses of sparsemax and entmax on the CPU. [per ISA]
//
// The map runs on a few rows at a time; from its probabilities, which stay in cache, come loss and gradient: of short
// rows together, one in each lane, of others row by row.
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

// Rows with their probabilities, a few at a time.
template <class A>
struct LossTile {
  const EntmaxLossParams& params;
  int64_t first, n;  // the first row of the call, elements of a row
  const A* x;
  A* p;  // probabilities; may be overwritten
  const A* y;  // distributions, or nullptr
  A* out;  // gradients, or nullptr
  Rows x_rows, p_rows, y_rows, out_rows;

  bool has_distribution() const { return params.target == nullptr; }
  int64_t own(int64_t i) const { return target_of(params, first + i); }
  bool counts(int64_t own) const { return is_counted(params, own); }
  A gradient(int64_t i) const {
    const A g = static_cast<const A*>(params.grad_output)[(first + i) * params.grad_output_stride];
    return A(double(g) / params.divisor);
  }
  void put_loss(int64_t i, double loss) const {
    if (params.row_loss != nullptr) static_cast<A*>(params.row_loss)[first + i] = A(loss);
  }
  const A* x_of(int64_t i) const { return x + i * x_rows.stride_inner; }
  A* p_of(int64_t i) const { return p + i * p_rows.stride_inner; }
  const A* y_of(int64_t i) const { return y + i * y_rows.stride_inner; }
  A* out_of(int64_t i) const { return out + i * out_rows.stride_inner; }
};

// Σ p and Σ p (x - r) of a row, its largest p, and its largest x with a p above 0.
struct LossSums {
  double mass, linear, largest_p, largest_x;
};
inline LossSums joined(const LossSums& a, const LossSums& b) {
  return {a.mass + b.mass, a.linear + b.linear, std::max(a.largest_p, b.largest_p), std::max(a.largest_x, b.largest_x)};
}
// The same of vectors: the elements of a row, or of a row in each lane.
template <class A>
struct LossVectors {
  using V = Vec<A>;
  V mass = {}, linear = {}, largest_p = {}, largest_x = splat<V>(-std::numeric_limits<A>::infinity());

  void add(V p, V x, V r) {
    const auto is_outside = p == V{};
    mass += p;
    linear += is_outside ? V{} : p * (x - r);  // of a logit of -inf, too
    largest_p = vmax(p, largest_p);
    largest_x = is_outside ? largest_x : vmax(x, largest_x);
  }
  LossVectors operator+(const LossVectors& o) const {
    return {mass + o.mass, linear + o.linear, vmax(largest_p, o.largest_p), vmax(largest_x, o.largest_x)};
  }
  LossSums of_row() const {
    return {double(reduce_add(mass)), double(reduce_add(linear)), double(reduce_max(largest_p)),
            double(reduce_max(largest_x))};
  }
  LossSums of_lane(int i) const {
    return {double(mass[i]), double(linear[i]), double(largest_p[i]), double(largest_x[i])};
  }
};

// Σ y, Σ y (x - r) and Σ y w(y) of a distribution.
struct TargetSums {
  double mass, linear, surprise;
};
inline TargetSums joined(const TargetSums& a, const TargetSums& b) {
  return {a.mass + b.mass, a.linear + b.linear, a.surprise + b.surprise};
}
template <class A>
struct TargetVectors {
  using V = Vec<A>;
  Surprise<A> w;
  V mass = {}, linear = {}, surprise = {};

  void add(V y, V x, V r) {
    mass += y;
    linear += y == V{} ? V{} : y * (x - r);
    surprise += y * w.of(y);
  }
  TargetVectors operator+(const TargetVectors& o) const {
    return {w, mass + o.mass, linear + o.linear, surprise + o.surprise};
  }
  TargetSums of_row() const {
    return {double(reduce_add(mass)), double(reduce_add(linear)), double(reduce_add(surprise))};
  }
  TargetSums of_lane(int i) const { return {double(mass[i]), double(linear[i]), double(surprise[i])}; }
};

// Those of a row: `zero` is LossVectors or TargetVectors.
template <class A, class Team, class Vectors>
[[gnu::flatten]] inline auto sums_of_row(Team team, const A* t, const A* x, int64_t n, A r, const Vectors& zero) {
  const Vec<A> reference = splat<Vec<A>>(r);
  const auto of_block = [&](int64_t begin, int64_t end) {
    Vectors first = zero, second = zero;
    const auto add = [&](int, int64_t, auto v, auto logit) {
      first.add(v.a, logit.a, reference), second.add(v.b, logit.b, reference);
    };
    for_pairs<2>(end - begin, A(0), add, t + begin, x + begin);
    return (first + second).of_row();
  };
  return reduce_row(team, n, kSumBlock, zero.of_row(), of_block,
                    [](const auto& a, const auto& b) { return joined(a, b); });
}
template <class A, class Vectors>
[[gnu::flatten]] inline Vectors sums_of_lanes(const Vec<A>* t, const Vec<A>* x, int64_t n, Vec<A> r, Vectors sums) {
  for (int64_t c = 0; c < n; ++c) sums.add(t[c], x[c], r);
  return sums;
}

// The loss of a row from the sums of its probabilities without the own class, whose probability is `own`; of_y: the
// sums of a distribution, or nullptr. r: the logit that sums are relative to.
template <class A>
inline double loss_of(const LossSums& of_p, A own, A r, const TargetSums* of_y, double alpha,
                      const Surprise<A>& surprise) {
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  const double mass = of_p.mass + double(own);
  if (!(mass > 0)) return std::numeric_limits<double>::quiet_NaN();  // of -inf alone, or with NaN
  if (double(r) == -kInfinity || of_p.linear == kInfinity) return kInfinity;
  // On the support w(p) + (x - r) is one number, the level: Σ p w(p) follows from the other sums.
  const bool own_is_largest = double(own) >= of_p.largest_p;
  const double level =
      double(surprise.of(own_is_largest ? own : A(of_p.largest_p))) + (own_is_largest ? 0 : of_p.largest_x - double(r));
  // The last term corrects for what rounding adds to Σ p.
  double loss = of_p.linear + (level * mass - of_p.linear) / alpha - (mass - 1) * (level - 1 / alpha);
  if (of_y != nullptr) loss += level * (of_y->mass - 1) - of_y->linear - of_y->surprise / alpha;
  return loss < 0 ? 0 : loss;  // NaN stays
}

// ---- row ------------------------------------------------------------------------------------------------------------

// Loss and gradient g (p - y) of row i; the gradient of the own class is g times what its probability lacks to 1.
template <class A, class Team>
inline void loss_row(Team team, const LossTile<A>& tile, int64_t i, double alpha) {
  using V = Vec<A>;
  const int64_t n = tile.n, own = tile.own(i);
  const A *const x = tile.x_of(i), *const y = tile.y_of(i);
  A* const p = tile.p_of(i);
  if (!tile.counts(own)) {
    tile.put_loss(i, 0);
    if (tile.out != nullptr) std::fill_n(tile.out_of(i), n, A(0));
    return;
  }
  const Surprise<A> surprise(alpha);
  const bool has_class = own >= 0;
  const A own_p = has_class ? std::exchange(p[own], A(0)) : A(0);
  const A r = has_class ? x[own] : block_max(x, n);
  const LossSums of_p = sums_of_row(team, p, x, n, r, LossVectors<A>{});
  const TargetSums of_y = has_class ? TargetSums{} : sums_of_row(team, y, x, n, r, TargetVectors<A>{surprise});
  tile.put_loss(i, loss_of(of_p, own_p, r, has_class ? nullptr : &of_y, alpha, surprise));
  if (tile.out == nullptr) return;
  A* const out = tile.out_of(i);
  const bool has_mass = of_p.mass + double(own_p) > 0;  // else the gradient is NaN, as the loss is
  const A g = has_mass ? tile.gradient(i) : std::numeric_limits<A>::quiet_NaN();
  const V factor = splat<V>(g);
  for_parts(team, n, kSumBlock, [&](int64_t begin, int64_t end) {
    if (has_class) map_row(out + begin, end - begin, [&](V pv) { return pv * factor; }, p + begin);
    else map_row(out + begin, end - begin, [&](V pv, V yv) { return (pv - yv) * factor; }, p + begin, y + begin);
  });
  if (has_class) out[own] = A(-of_p.mass * double(g));
}

// ---- lanes ----------------------------------------------------------------------------------------------------------

constexpr int64_t kMostInLossLanes = 32;  // rows of more classes are as fast one by one

// The same for rows [begin, begin + count), one in each lane.
template <class A>
inline void loss_lanes(const LossTile<A>& tile, int64_t begin, int64_t count, double alpha) {
  using V = Vec<A>;
  constexpr A kLow = -std::numeric_limits<A>::infinity();
  const int64_t n = tile.n;
  const bool has_distribution = tile.has_distribution();
  const Surprise<A> surprise(alpha);
  V x[kMostInLossLanes], p[kMostInLossLanes], y[kMostInLossLanes];
  V own_p = {}, g = {}, r = has_distribution ? splat<V>(kLow) : V{};
  int64_t own[Accumulate<A>::kLanes];
  for (int64_t k = 0; k < count; ++k) {
    own[k] = tile.own(begin + k);
    if (tile.out != nullptr) g[k] = tile.gradient(begin + k);
    if (has_distribution || !tile.counts(own[k])) continue;
    own_p[k] = std::exchange(tile.p_of(begin + k)[own[k]], A(0));
    r[k] = tile.x_of(begin + k)[own[k]];
  }
  load_lanes(tile.x_of(begin), tile.x_rows, n, count, x);
  load_lanes(tile.p_of(begin), tile.p_rows, n, count, p);
  if (has_distribution) load_lanes(tile.y_of(begin), tile.y_rows, n, count, y);
  for (int64_t c = 0; has_distribution && c < n; ++c) r = vmax(x[c], r);
  const LossVectors<A> of_p = sums_of_lanes<A>(p, x, n, r, LossVectors<A>{});
  TargetVectors<A> of_y{surprise};
  if (has_distribution) of_y = sums_of_lanes<A>(y, x, n, r, of_y);
  for (int64_t k = 0; k < count; ++k) {
    const TargetSums sums = of_y.of_lane(k);
    const double loss = loss_of(of_p.of_lane(k), own_p[k], r[k], has_distribution ? &sums : nullptr, alpha, surprise);
    tile.put_loss(begin + k, tile.counts(own[k]) ? loss : 0);
  }
  if (tile.out == nullptr) return;
  g = of_p.mass + own_p > A(0) ? g : splat<V>(std::numeric_limits<A>::quiet_NaN());
  for (int64_t c = 0; c < n; ++c) p[c] = (has_distribution ? p[c] - y[c] : p[c]) * g;
  store_lanes(tile.out_of(begin), tile.out_rows, n, count, p);
  for (int64_t k = 0; k < count; ++k) {
    A* const out = tile.out_of(begin + k);
    if (!tile.counts(own[k])) std::fill_n(out, n, A(0));
    else if (!has_distribution) out[own[k]] = A(-double(of_p.mass[k]) * double(g[k]));
  }
}

// ---- all rows -------------------------------------------------------------------------------------------------------

template <class A>
inline void loss_rows(const EntmaxLossParams& p, int64_t begin, int64_t end) {
  constexpr int64_t kLanes = Accumulate<A>::kLanes;
  const int64_t n = p.map.rows.n, most = std::min(p.map.rows.inner, end - begin);
  const bool has_gradient = p.map.grad_input != nullptr, has_distribution = p.target == nullptr;
  const bool by_lanes = n <= kMostInLossLanes && p.map.alpha.each == nullptr;
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
    LossTile<A> tile = {p, first, n, x.first(first), probabilities.first()};
    tile.x_rows = map.rows;
    tile.p_rows = map.output_rows;
    if (has_distribution) tile.y = y.first(first), tile.y_rows = y.shape(count);
    if (has_gradient) tile.out = out.first(first), tile.out_rows = out.shape(count);
    if (by_lanes) {
      for (int64_t i = 0; i < count; i += kLanes) loss_lanes(tile, i, std::min(kLanes, count - i), p.map.alpha.same);
    } else {
      with_team(p.share_row, [&](auto team) {
        for (int64_t i = 0; i < count; ++i) loss_row(team, tile, i, p.map.alpha(first + i));
      });
    }
    if (has_gradient) out.write(first, count);
  });
}

void entmax_loss_rows(const EntmaxLossParams& p, int64_t begin, int64_t end) {
  p.map.dtype == DType::kFloat64 ? loss_rows<double>(p, begin, end) : loss_rows<float>(p, begin, end);
}
#endif
