// What cross-entropy computes once for each row: losses and the factors of the gradient, for as many rows at once as a
// vector has lanes. [per ISA]
//
// Both walks call the functions of RowBatch, so that a row has the same bits in every layout. They are not inlined: the
// compiler may contract a · b + c · d in two ways, and could choose differently in each copy.
#if defined(TSE_CROSS_ENTROPY_BATCH_INL_H) == defined(TSE_ISA_TOGGLE)
#ifdef TSE_CROSS_ENTROPY_BATCH_INL_H
#undef TSE_CROSS_ENTROPY_BATCH_INL_H
#else
#define TSE_CROSS_ENTROPY_BATCH_INL_H
#endif
#include "common/cpu/exp_sum-inl.h"

// The weights t that every class has: smoothing · w / C, and of probabilities all. A target's class has weight_of more.
template <class T>
struct Coefficients {
  using A = Acc<T>;
  const T* probabilities;  // contiguous ones of a row; nullptr: none
  const A* weight;
  A keep, even;
  Coefficients(const CrossEntropyParams& p, const T* probabilities)
      : probabilities(probabilities),
        weight(static_cast<const A*>(p.weight)),
        keep(A(1 - p.label_smoothing)),
        even(A(p.label_smoothing / double(p.rows.n))) {}

  Coefficients from(int64_t begin) const {
    Coefficients c = *this;
    if (probabilities != nullptr) c.probabilities += begin;
    if (weight != nullptr) c.weight += begin;
    return c;
  }
  // Of elements [i, i + count).
  Vec<T> operator()(int64_t i, int64_t count) const {
    const bool whole = count == Accumulate<T>::kLanes;
    Vec<T> t = splat<Vec<T>>(even);
    if (probabilities != nullptr) t = of(whole ? load(probabilities + i) : load_part(probabilities + i, count, A(0)));
    if (weight != nullptr) t *= whole ? load(weight + i) : load_part(weight + i, count, A(0));
    return t;
  }
  // Of class c, whose probability is q in each lane.
  Vec<T> of_class(int64_t c, Vec<T> q) const { return weight != nullptr ? of(q) * weight[c] : of(q); }

 private:
  Vec<T> of(Vec<T> q) const { return multiply_subtract(splat<Vec<T>>(keep), q, splat<Vec<T>>(-even)); }
};

// The sums of a block of a contiguous row. kGeneral: with softcap or coefficients of all classes.
template <bool kGeneral, class T, class L>
inline BlockSum block_sum(const T* x, int64_t n, int64_t own, Acc<T> reference, const L& logits,
                          const Coefficients<T>& coefficients) {
  if constexpr (kGeneral) return block_linear_sum(x, n, own, reference, logits, coefficients);
  else return block_exp_sum(x, n, own, reference, logits);
}

template <class T>
struct RowBatch {
  using A = Acc<T>;
  using V = Vec<T>;
  using Lanes = decltype(V{} > V{});
  using Index = std::remove_cv_t<std::remove_reference_t<decltype(Lanes{}[0])>>;
  static constexpr int kRows = Accumulate<T>::kLanes;

  int64_t row = 0, count = 0;  // the first row, how many there are
  // Of each row: the own class (-1: none), its z, and the two parts of its weight, as the target and as any class; then
  // the sums over all other classes.
  alignas(64) Index own[kRows] = {};
  alignas(64) A own_z[kRows] = {}, own_weight[kRows] = {}, own_coefficient[kRows] = {};
  alignas(64) A m[kRows] = {}, others[kRows] = {}, half_linear[kRows] = {}, mass[kRows] = {};
  alignas(64) A sum[kRows], own_term[kRows];  // complete
  alignas(64) A scale[kRows], target[kRows], at_own[kRows];  // find_factors

  Lanes own_lanes() const {
    Lanes v;
    std::memcpy(&v, own, sizeof v);
    return v;
  }
  // Class probabilities always count.
  Lanes counted(const CrossEntropyParams& p) const {
    return p.target == nullptr ? Lanes{} - 1 : own_lanes() >= Lanes{};
  }

  void set_sums(int64_t i, const BlockSum& s) {
    m[i] = A(s.m);
    others[i] = A(s.sum);
    half_linear[i] = A(s.linear / 2);
    mass[i] = A(s.mass);
  }

  // Adds the term of the own class to the sums, and the two parts of its weight.
  template <class L>
  [[gnu::noinline]] void complete(const L& logits) {
    const Lanes has_own = own_lanes() >= Lanes{};
    const V term = chosen(has_own, logits.term(load(own_z), load(m)));
    store(own_weight, chosen(has_own, load(own_weight) + load(own_coefficient)));
    store(own_term, term);
    store(sum, load(others) + term);
  }

  // Writes statistics and losses.
  template <bool kGeneral, class L>
  [[gnu::noinline]] void write_forward(const CrossEntropyParams& p, const L& logits) const {
    const A slope = A(logits.slope);
    const V reference = load(m), all = load(sum), low = splat<V>(-std::numeric_limits<A>::infinity());
    const V below = reference * A(0.5) - load(own_z) * A(0.5);  // half of a difference of finite logits is finite
    const Lanes has_own = own_lanes() >= Lanes{}, is_counted = counted(p);
    V loss = has_own ? negative_log<T>(load(own_term), load(others), below, 2 * slope) * load(own_weight) : V{};
    const bool add_z_loss = p.z_loss_weight != 0 && p.reduction == Reduction::kNone;
    if (add_z_loss || (kGeneral && p.row_mass != nullptr)) {
      const V log_sum = log2(all) * kLn2<A>, lse = reference * slope + log_sum;
      if (kGeneral && p.row_mass != nullptr) loss += load(mass) * log_sum - load(half_linear) * slope * A(2);
      if (add_z_loss) loss += A(p.z_loss_weight) * lse * lse;
    }
    put(p.row_m, is_counted ? reference : low);
    put(p.row_sum, is_counted ? all : V{});
    put(p.row_others, is_counted ? load(others) : V{});
    if (p.row_mass != nullptr) put(p.row_mass, is_counted ? load(mass) : V{});
    put(p.row_loss, is_counted ? loss : V{});
  }

  // The sums, as forward wrote them.
  void read_forward(const CrossEntropyParams& p) {
    get(p.row_m, m);
    get(p.row_others, others);
    if (p.row_mass != nullptr) get(p.row_mass, mass);
  }

  // The gradient of a class is scale · term - target · its coefficient, and at_own of the own class.
  template <class L>
  [[gnu::noinline]] void find_factors(const CrossEntropyParams& p, const L& logits) {
    const bool has_lse = p.grad_lse != nullptr || p.z_loss_weight != 0, by_rows = has_lse || p.grad_output_stride != 0;
    V t = splat<V>(by_rows ? A(0) : A(grad_factors<A>(p, row, 0).target)), lse = {};
    for (int64_t i = 0; by_rows && i < count; ++i) {
      const GradFactors f = grad_factors<A>(p, row + i, has_lse ? lse_of(p.transform, m[i], sum[i]) : 0);
      t[i] = A(f.target);
      lse[i] = A(f.lse);
    }
    const V s = load(sum), w = load(own_weight), of_others = t * load(mass) + lse;  // as GradFactors
    V own_grad = of_others * (load(own_term) / s) - t * w * (load(others) / s);
    if (logits.capped) own_grad *= splat<V>(1) - load(own_z) * load(own_z);
    store(target, t);
    store(scale, (t * w + of_others) / s);
    store(at_own, own_grad);
  }

 private:
  void put(void* array, V v) const {
    A* to = static_cast<A*>(array) + row;
    if (count == kRows) store(to, v);
    else store_part(to, count, v);
  }
  void get(const void* array, A* to) const { std::memcpy(to, static_cast<const A*>(array) + row, count * sizeof(A)); }
};
#endif
