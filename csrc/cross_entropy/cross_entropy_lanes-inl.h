// Cross-entropy by lanes: as many rows at once as a vector has lanes, class by class, in any layout. [per ISA]
//
// Rows of up to kBuffer classes are held transposed: memory is read once, and the terms of forward are those of
// backward. The classes of longer rows are read once more in backward. Rows of more than kMostInLanes classes are
// summed in the order of the row walk, which takes them where they are contiguous: the bits are the same. A row whose
// terms overflow against its reference (exp_sum-inl.h) is summed by the row walk's function.
#if defined(TSE_CROSS_ENTROPY_LANES_INL_H) == defined(TSE_ISA_TOGGLE)
#ifdef TSE_CROSS_ENTROPY_LANES_INL_H
#undef TSE_CROSS_ENTROPY_LANES_INL_H
#else
#define TSE_CROSS_ENTROPY_LANES_INL_H
#endif
#include "cross_entropy/cross_entropy_batch-inl.h"

template <class T, bool kForward, bool kBackward, bool kGeneral>
class LanesWalk {
  using A = Acc<T>;
  using V = Vec<T>;
  using Batch = RowBatch<T>;
  using Lanes = typename Batch::Lanes;
  using Index = typename Batch::Index;
  static constexpr int kLanes = Accumulate<T>::kLanes;
  static constexpr int64_t kBuffer = kReference;

  const CrossEntropyParams& p;
  const Logits<T, kGeneral> logits;
  const Coefficients<T> coefficients;
  const int64_t n;
  const bool buffered, has_probabilities;
  Batch rows;
  // Of the rows at hand.
  const T *x, *q;
  T* g;
  Lanes counted;
  bool kept;  // z holds terms
  std::unique_ptr<T[]> copy;  // of a block of one row
  V z[kBuffer], u[kGeneral ? kBuffer : 1];  // the first logits or their terms; the coefficients, if all fit

 public:
  explicit LanesWalk(const CrossEntropyParams& p)
      : p(p),
        logits(p.transform),
        coefficients(p, nullptr),
        n(p.rows.n),
        buffered(n <= kBuffer),
        has_probabilities(p.probabilities != nullptr) {
    if (kGeneral && buffered && !has_probabilities)
      for (int64_t c = 0; c < n; ++c) u[c] = coefficients.of_class(c, V{});
  }

  [[gnu::flatten]] void run(int64_t begin, int64_t end) {
    const bool one_run = has_one_stride(p.rows) && (!kBackward || has_one_stride(p.grad_rows)) &&
                         (!has_probabilities || has_one_stride(p.probabilities_rows));
    for_each_lanes<kLanes>(p.rows, one_run, begin, end, [&](int64_t row, int64_t count, Position at) {
      rows.row = row;
      rows.count = count;
      x = static_cast<const T*>(p.input) + at.in(p.rows);
      if (has_probabilities) q = static_cast<const T*>(p.probabilities) + at.in(p.probabilities_rows);
      if (kBackward) g = static_cast<T*>(p.grad_input) + at.in(p.grad_rows);
      load_lanes(x, p.rows, std::min(n, kBuffer), rows.count, z);
      load_rows();
      if (kForward && p.predictions != nullptr) predict();
      if (kForward) add_up();
      else rows.read_forward(p);
      if (logits.capped) store(rows.own_z, logits.cap(load(rows.own_z)));
      rows.complete(logits);
      if (kForward) rows.template write_forward<kGeneral>(p, logits);
      if (kBackward) write_gradient();
    });
  }

 private:
  V logit(int64_t c) const {
    if (c < kBuffer) return z[c];
    __builtin_prefetch(x + (c + 16) * p.rows.stride_n, 0, 2);
    return load_class(x, p.rows, c, rows.count);
  }
  V coefficient(int64_t c) const {
    if (!kGeneral) return V{};
    if (buffered) return u[c];
    return coefficients.of_class(c, has_probabilities ? probability(c) : V{});
  }
  V probability(int64_t c) const { return load_class(q, p.probabilities_rows, c, rows.count); }
  template <class Target>
  void load_targets(const Target* target) {
    typedef Target Targets __attribute__((vector_size(kLanes * sizeof(Target))));
    Targets t = Targets{} - 1;
    if (rows.count == kLanes) std::memcpy(&t, target, sizeof t);
    else std::memcpy(&t, target, rows.count * sizeof(Target));
    const Target ignored = Target(p.ignore_index);
    if (ignored == p.ignore_index) t = t == ignored ? Targets{} - 1 : t;
    const Lanes own = __builtin_convertvector(t, Lanes);
    std::memcpy(rows.own, &own, sizeof own);
  }

  // Targets, logits and own classes.
  void load_rows() {
    if (p.target == nullptr) std::fill_n(rows.own, kLanes, Index(-1));
    else if (p.target_is_int32) load_targets(static_cast<const int32_t*>(p.target) + rows.row);
    else load_targets(static_cast<const int64_t*>(p.target) + rows.row);
    counted = rows.counted(p) & lanes_before<V>(rows.count);
    kept = false;
    if (kGeneral && has_probabilities) {
      Lanes own = rows.own_lanes();
      if (buffered) load_lanes(q, p.probabilities_rows, n, rows.count, u);
      for (int64_t c = 0; c < n; ++c) {
        const V v = buffered ? u[c] : probability(c);
        own = (v > V{} + A(0.5)) & (own < Lanes{}) ? Lanes{} + Index(c) : own;
        if (buffered) u[c] = coefficients.of_class(c, v);
      }
      std::memcpy(rows.own, &own, sizeof own);
    }
    alignas(64) Index classes[kLanes];  // where there is no own class, the first one does no harm
    const Lanes at_least_first = chosen(rows.own_lanes() >= Lanes{}, rows.own_lanes());
    std::memcpy(classes, &at_least_first, sizeof classes);
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) {
      const int64_t c = classes[i];
      if (buffered) rows.own_z[i] = z[c][i];
      else if (i < rows.count) rows.own_z[i] = load_one(x + i * p.rows.stride_inner + c * p.rows.stride_n);
      if (kGeneral || p.weight != nullptr) rows.own_weight[i] = weight_of<A>(p, c);
      if (kGeneral) rows.own_coefficient[i] = coefficient(c)[i];
    }
    if (!kGeneral && p.weight == nullptr) store(rows.own_weight, splat<V>(1));
  }

  [[gnu::noinline]] void predict() {
    V best = logit(0);
    Lanes at = {};
    for (int64_t c = 1; c < n; ++c) {
      const V v = logit(c);
      const Lanes better = (v > best) | ((v != v) & (best == best));  // the first NaN, if there is one
      best = better ? v : best;
      at = better ? Lanes{} + Index(c) : at;
    }
    for (int64_t i = 0; i < rows.count; ++i) p.predictions[rows.row + i] = counted[i] ? at[i] : p.ignore_index;
  }

  void add_up() {
    const V low = splat<V>(-std::numeric_limits<A>::infinity());
    V several[4] = {low, low, low, low};  // maxima, NaN aside
    const int64_t first = std::min(n, kReference);
    int64_t c = 0;
    for (; c + 4 <= first; c += 4)
      for (int k = 0; k < 4; ++k) several[k] = vmax(z[c + k], several[k]);
    for (; c < first; ++c) several[0] = vmax(z[c], several[0]);
    V max = vmax(vmax(several[0], several[1]), vmax(several[2], several[3]));
    if (!buffered) max = rows.own_lanes() >= Lanes{} ? vmax(load(rows.own_z), max) : max;
    max = logits.cap(max);
    store(rows.m, max);
    if (n > kBlock) return add_up_blocks();
    double sum[kLanes] = {}, linear[kLanes] = {}, mass[kLanes] = {};
    const V sums = block_sums(0, n, sum, linear, mass);
    kept = kBackward && buffered && !logits.capped;
    store(rows.others, sums);
    for (int i = 0; kGeneral && i < kLanes; ++i) {
      rows.half_linear[i] = A(linear[i] / 2);
      rows.mass[i] = A(mass[i]);
    }
    const Lanes good = (max > low) & (sums <= V{} + A(kLargestSum));
    if (mask_above(chosen(counted & ~good, splat<V>(1)), A(0)) == 0) return;
    for (int64_t i = 0; i < rows.count; ++i)
      if (counted[i] && !good[i]) rows.set_sums(i, sum_by_row(i, 0, n));
    if (kept) load_lanes(x, p.rows, n, rows.count, z);
    kept = false;
  }

  [[gnu::noinline, gnu::flatten]] void add_up_blocks() {
    BlockSum total[kLanes];
    std::fill_n(total, kLanes, kNothing);
    for (int64_t begin = 0; begin < n; begin += kBlock) {
      const int64_t size = std::min(kBlock, n - begin);
      double sum[kLanes] = {}, linear[kLanes] = {}, mass[kLanes] = {};
      const V sums = block_sums(begin, size, sum, linear, mass);
      for (int64_t i = 0; i < rows.count; ++i) {
        if (!counted[i]) continue;
        const double m = rows.m[i], s = kGeneral ? sum[i] : sums[i];
        const bool good = m > -std::numeric_limits<double>::infinity() && sums[i] <= kLargestSum;
        total[i] = logits.join(total[i], good ? BlockSum{m, s, linear[i], mass[i]} : sum_by_row(i, begin, size));
      }
    }
    for (int64_t i = 0; i < rows.count; ++i) rows.set_sums(i, total[i]);
  }

  // The sums of classes [begin, begin + size) without the own one; the terms take the place of buffered logits.
  V block_sums(int64_t begin, int64_t size, double* sum, double* linear, double* mass) {
    const V m = load(rows.m);
    const Lanes own = rows.own_lanes();
    if constexpr (kGeneral) {
      lanes_linear_sum<T>(size, sum, linear, mass, [&](int64_t i, V& s, V& l, V& w) {
        const int64_t c = begin + i;
        const V half = logits.half_difference(logits.cap(logit(c)), m), t = logits.half_term(half);
        const V weight = coefficient(c);
        const Lanes is_own = own == Lanes{} + Index(c);
        s += is_own ? V{} : t;
        l += is_own ? V{} : rounded_product(weight, half);
        w += is_own ? V{} : weight;
        if (kBackward && buffered && !logits.capped) z[c] = t;
      });
      V all;
      for (int i = 0; i < kLanes; ++i) all[i] = A(sum[i]);
      return all;
    } else if (n <= kMostInLanes) {  // no other walk has such rows: any order will do
      V s[2] = {};
      const auto add = [&](int64_t c, int k) {
        const V t = logits.term(z[c], m);
        if (kBackward) z[c] = t;
        s[k] += own == Lanes{} + Index(c) ? V{} : t;
      };
      int64_t c = 0;
      for (; c + 2 <= n; c += 2) add(c, 0), add(c + 1, 1);
      if (c < n) add(c, 0);
      return s[0] + s[1];
    } else {
      return lanes_exp_sum<T>(size, [&](int64_t i) {
        const int64_t c = begin + i;
        const V t = logits.term(logit(c), m);
        if (kBackward && buffered) z[c] = t;
        return own == Lanes{} + Index(c) ? V{} : t;
      });
    }
  }

  // The sums of classes [begin, begin + size) of one row, by the row walk.
  [[gnu::noinline]] BlockSum sum_by_row(int64_t lane, int64_t begin, int64_t size) {
    if (copy == nullptr) copy.reset(new T[2 * kBlock]);
    const auto copied = [&](const T* from, const Rows& strides, T* to) {
      from += lane * strides.stride_inner + begin * strides.stride_n;
      for (int64_t i = 0; i < size; ++i) to[i] = from[i * strides.stride_n];
      return to;
    };
    const T* row = copied(x, p.rows, copy.get());
    Coefficients<T> c = coefficients.from(begin);
    if (has_probabilities) c.probabilities = copied(q, p.probabilities_rows, copy.get() + kBlock);
    return block_sum<kGeneral>(row, size, rows.own[lane] - begin, rows.m[lane], logits, c);
  }

  void write_gradient() {
    rows.find_factors(p, logits);
    const V m = load(rows.m), scale = load(rows.scale), target = load(rows.target), at_own = load(rows.at_own);
    const V one = splat<V>(1);
    const Lanes own = rows.own_lanes(), is_counted = counted;
    const auto gradient = [&](int64_t c, V v, auto is_term) {
      V grad;
      if constexpr (kGeneral) {
        if (logits.capped) v = logits.cap(v);
        const V term = is_term ? v : logits.half_term(logits.half_difference(v, m));
        grad = multiply_subtract(term, scale, coefficient(c) * target);
        if (logits.capped) grad *= one - v * v;
      } else {
        grad = (is_term ? v : logits.term(v, m)) * scale;
      }
      // 0 even where an ignored row's logits are not finite.
      return chosen(is_counted, own == Lanes{} + Index(c) ? at_own : grad);
    };
    if (!buffered) {
      for (int64_t c = 0; c < n; ++c)
        store_class(g, p.grad_rows, c, rows.count, gradient(c, logit(c), std::false_type()));
      return;
    }
    if (kept)
      for (int64_t c = 0; c < n; ++c) z[c] = gradient(c, z[c], std::true_type());
    else
      for (int64_t c = 0; c < n; ++c) z[c] = gradient(c, z[c], std::false_type());
    store_lanes(g, p.grad_rows, n, rows.count, z);
  }
};
#endif
