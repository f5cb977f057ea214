// Σ exp over rows, block by block. [per ISA]
//
// A term is exp2((z - m) · scale) against a reference m, the z of one of the row's logits (exp_sum.h). The reference is
// the largest of the row's first logits and of the own class. All blocks keep it without looking for their own maximum:
// terms may be far above 1. A block whose sum shows that it is too far from the reference is summed again with its own.
// The own class (-1: none) is left out of every sum: the rest is needed exactly where its probability is next to 1.
//
// The row walk and the lanes walk (rows-inl.h) add the same terms in the same order, so that a row has the same bits
// in every layout: for_vectors adds element i to one of 4 · kLanes slots, and the lanes walk has these slots, too.
#if defined(TSE_EXP_SUM_INL_H) == defined(TSE_ISA_TOGGLE)
#ifdef TSE_EXP_SUM_INL_H
#undef TSE_EXP_SUM_INL_H
#else
#define TSE_EXP_SUM_INL_H
#endif
#include "common/cpu/math-inl.h"
#include "common/cpu/rows-inl.h"

constexpr int64_t kBlock = kExpSumBlock;
constexpr int64_t kReference = 512;  // elements whose maximum is the row's reference
constexpr double kLargestSum = 16 * kBlock;  // of a block: more is too far from the reference
constexpr BlockSum kNothing = {-std::numeric_limits<double>::infinity(), 0};

// A logit on its way to the exponent. Without softcap, which is known beforehand, the functions below are short.
template <class T, bool kMayCap = true>
struct Logits {
  using A = Acc<T>;
  Vec<T> scale, twice_scale, inverse_cap;
  double slope;
  bool capped;
  explicit Logits(const LogitTransform& t)
      : scale(splat<Vec<T>>(t.exponent_scale<A>())),
        twice_scale(splat<Vec<T>>(bounded<A>(2 * double(scale[0])))),
        inverse_cap(splat<Vec<T>>(t.softcap > 0 ? A(1 / t.softcap) : A(0))),
        slope(t.slope()),
        capped(kMayCap && t.softcap > 0) {}

  Vec<T> cap(Vec<T> x) const {  // z of x
    if constexpr (!kMayCap) return x;
    return capped ? tanh(x * inverse_cap) : x;
  }
  A z_of(const T* x) const { return cap(splat<Vec<T>>(load_one(x)))[0]; }

  Vec<T> exponent(Vec<T> z, Vec<T> m) const { return (z - m) * scale; }
  // (z - m) / 2, which is finite where z and m are; times twice_scale the exponent.
  Vec<T> half_difference(Vec<T> z, Vec<T> m) const { return z * A(0.5) - m * A(0.5); }
  Vec<T> half_term(Vec<T> half) const { return exp2<T>(half * twice_scale); }
  Vec<T> term(Vec<T> z, Vec<T> m) const { return exp2<T>(exponent(z, m)); }
  A term_of(A z, A m) const { return term(splat<Vec<T>>(z), splat<Vec<T>>(m))[0]; }  // the bits that it has in a sum

  // Not inlined: the compiler would contract products and sums of double in another way at another place.
  [[gnu::noinline]] BlockSum join(BlockSum a, BlockSum b) const {
    if (b.m > a.m) std::swap(a, b);
    if (b.sum != 0) a.sum += a.m == b.m ? b.sum : b.sum * std::exp2((b.m - a.m) * double(scale[0]));
    a.linear += b.linear + (std::isfinite(b.m) ? (b.m - a.m) * b.mass : 0);
    a.mass += b.mass;
    return a;
  }
};

// -log p of a class, from its term, the sum of all others, and how far z is below the reference m. A term is compared
// with the sum of the others where it can be: what exp2 is off by, 3e-6 for half types, is off in both. Else nothing
// cancels, either: m is not below z, and the sum not below 1.
constexpr double kComparable = 16;  // times the term
template <class T>
inline Vec<T> negative_log(Vec<T> term, Vec<T> others, Vec<T> below_reference, Acc<T> slope) {
  const Vec<T> odds = others / term;
  const auto comparable = odds < Acc<T>(kComparable);
  const Vec<T> log2_sum = log2_1p_or(odds < Acc<T>(1.0 / 3), odds, comparable ? odds + Acc<T>(1) : others + term);
  return log2_sum * kLn2<Acc<T>> + (comparable ? Vec<T>{} : below_reference * slope);
}
inline double negative_log(double term, double others, double below_reference, double slope) {
  const double odds = others / term;
  return odds < kComparable ? std::log1p(odds) : std::log(others + term) + below_reference * slope;
}

template <class T, class L>
inline Acc<T> row_reference(const T* x, int64_t n, int64_t own, const L& logits) {
  Acc<T> max = block_max(x, std::min(kReference, n));
  if (own >= 0) max = std::max(max, load_one(x + own));  // of NaN the other
  return logits.cap(splat<Vec<T>>(max))[0];
}

// The sums of a block by sum(m): against the row's reference where that serves, else against the block's maximum.
template <class T, class L, class Sum>
inline BlockSum block_sums_by(const T* x, int64_t n, Acc<T> row_reference, const L& logits, const Sum& sum) {
  using A = Acc<T>;
  const A low = -std::numeric_limits<A>::infinity();
  if (row_reference != low) {
    const BlockSum s = sum(row_reference);
    if (A(s.sum) <= kLargestSum) return s;  // rounded, as the lanes walk compares
  }
  const A m = logits.cap(splat<Vec<T>>(block_max(x, n)))[0];
  BlockSum s = sum(m != low ? m : A(0));
  s.m = m;  // -inf alone adds 0, and NaN is seen
  return s;
}

// Σ of the terms, logits without softcap. With kKeep the terms are kept for backward.
template <bool kKeep = false, class T, class L>
[[gnu::flatten]] inline BlockSum block_exp_sum(const T* x, int64_t n, int64_t own, Acc<T> row_reference,
                                               const L& logits, Acc<T>* kept = nullptr) {
  constexpr int kLanes = Accumulate<T>::kLanes;
  return block_sums_by(x, n, row_reference, logits, [&](Acc<T> m) {
    const Vec<T> reference = splat<Vec<T>>(m);
    Vec<T> sum[4] = {};
    for_vectors(x, n, own, [&](int k, Vec<T> v, int64_t i, auto used) {
      const Vec<T> t = logits.term(v, reference);
      if constexpr (kKeep) store(kept + i + (k & 1) * kLanes, t);
      sum[k] += chosen(used, t);
    });
    return BlockSum{double(m), double(reduce_add((sum[0] + sum[1]) + (sum[2] + sum[3])))};
  });
}

// With softcap or coefficients, too: u(i, count) are those of elements [i, i + count). One vector at a time: with tanh
// in it, more of them would not fit into registers. Terms of `linear` may be large and alike, so sums are short.
template <class T>
constexpr int64_t kShortSum = 32 * Accumulate<T>::kLanes;
template <class T, class L, class U>
[[gnu::flatten]] inline BlockSum block_linear_sum(const T* x, int64_t n, int64_t own, Acc<T> row_reference,
                                                  const L& logits, const U& u) {
  constexpr int kLanes = Accumulate<T>::kLanes;
  if (own < 0 || own >= n) own = -1;
  return block_sums_by(x, n, row_reference, logits, [&](Acc<T> m) {
    const Vec<T> reference = splat<Vec<T>>(m);
    BlockSum total = {double(m), 0};
    for (int64_t begin = 0; begin < n; begin += kShortSum<T>) {
      Vec<T> sum = {}, linear = {}, mass = {};
      const auto add = [&](Vec<T> v, Vec<T> c, auto used) {
        const Vec<T> half = logits.half_difference(logits.cap(v), reference);
        sum += chosen(used, logits.half_term(half));
        linear += chosen(used, rounded_product(c, half));
        mass += chosen(used, c);
      };
      const int64_t end = std::min(begin + kShortSum<T>, n);
      for (int64_t i = begin; i < end; i += kLanes) {
        const int64_t count = end - i;
        if (count >= kLanes && uint64_t(own - i) >= kLanes) {
          add(load(x + i), u(i, kLanes), AllLanes{});
        } else {
          const auto used = lanes_before<Vec<T>>(count) & lanes_but<Vec<T>>(own - i);
          add(count < kLanes ? load_part(x + i, count, Acc<T>(0)) : load(x + i), u(i, std::min<int64_t>(count, kLanes)),
              used);
        }
      }
      total.sum += double(reduce_add(sum));
      total.linear += 2 * double(reduce_add(linear));
      total.mass += double(reduce_add(mass));
    }
    return total;
  });
}

// The sums of a row, from those of its blocks: sum(begin, end).
template <class Team, class L, class Sum>
[[gnu::always_inline]] inline BlockSum row_sums(Team team, int64_t n, const L& logits, const Sum& sum) {
  return reduce_row(team, n, kBlock, kNothing, sum,
                    [&](const BlockSum& a, const BlockSum& b) { return logits.join(a, b); });
}

// ---- lanes ----------------------------------------------------------------------------------------------------------

// Lane by lane, reduce_add of a vector whose lane k is slots[k]; overwrites the slots.
template <class V>
inline V reduce_slots(V* slots) {
#pragma GCC unroll 4
  for (int half = sizeof(V) / sizeof(slots[0][0]) / 2; half > 0; half /= 2)
    for (int k = 0; k < half; ++k) slots[k] += slots[k + half];
  return slots[0];
}

// Lane by lane, what block_exp_sum adds up of n terms: term(c), 0 where c is the own class.
template <class T, class Term>
[[gnu::always_inline]] inline Vec<T> lanes_exp_sum(int64_t n, const Term& term) {
  constexpr int kLanes = Accumulate<T>::kLanes, kSlots = 4 * kLanes;
  Vec<T> slots[kSlots];
  const int sums = !kEvenOdd<T> && n <= kLanes ? 1 : n <= 2 * kLanes ? 2 : 4;  // the others would be 0
  for (int k = 0; k < sums * kLanes; ++k) slots[k] = Vec<T>{};
  for (int64_t begin = 0; begin < n; begin += kSlots) {
    const int count = std::min<int64_t>(kSlots, n - begin);
    for (int i = 0; i < count; ++i) slots[slot_of<T>(i)] += term(begin + i);
  }
  for (int k = 0; sums > 1 && k < kLanes; ++k) {
    slots[k] += slots[k + kLanes];
    if (sums == 4) slots[k] += slots[k + 2 * kLanes] + slots[k + 3 * kLanes];
  }
  return reduce_slots(slots);
}

// Lane by lane, what block_linear_sum adds up of n classes. add(c, sum, linear, mass) adds class c, if it is not the
// own one.
template <class T, class Add>
[[gnu::always_inline]] inline void lanes_linear_sum(int64_t n, double* sum, double* linear, double* mass,
                                                    const Add& add) {
  constexpr int kLanes = Accumulate<T>::kLanes;
  for (int64_t begin = 0; begin < n; begin += kShortSum<T>) {
    Vec<T> s[kLanes] = {}, l[kLanes] = {}, u[kLanes] = {};
    const int count = std::min<int64_t>(kShortSum<T>, n - begin);
    for (int i = 0; i < count; ++i) add(begin + i, s[i % kLanes], l[i % kLanes], u[i % kLanes]);
    const Vec<T> all = reduce_slots(s), half = reduce_slots(l), weights = reduce_slots(u);
    for (int i = 0; i < kLanes; ++i) {
      sum[i] += double(all[i]);
      linear[i] += 2 * double(half[i]);
      mass[i] += double(weights[i]);
    }
  }
}
#endif
