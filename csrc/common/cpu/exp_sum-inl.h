// Σ exp over rows, block by block. [per ISA]
//
// A term is exp2((z - m) · scale) against a reference m, the z of one of the row's logits (exp_sum.h). The reference is
// the largest of the row's first logits and of the own class, and all blocks keep it without looking for their own
// maximum: terms may well be above 1, and a block whose sum shows that it is far from the reference is summed again
// with its own. The own class (-1: none) is left out of every sum: what it leaves is needed exactly where its
// probability is next to 1.
#include "common/cpu/math-inl.h"

constexpr int64_t kBlock = kExpSumBlock;
constexpr int64_t kReference = 512;  // elements whose maximum is the row's reference
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
  Vec<T> term(Vec<T> z, Vec<T> m) const { return exp2<T>(exponent(z, m)); }
  A term_of(A z, A m) const { return term(splat<Vec<T>>(z), splat<Vec<T>>(m))[0]; }  // the bits that it has in a sum

  BlockSum join(BlockSum a, BlockSum b) const {
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

// The terms of elements [0, 2 · kLanes) of x, ordered as load2 orders them.
template <class T, class L>
inline Pair<Vec<T>> terms2(const T* x, Vec<T> m, const L& logits) {
  const Pair<Vec<T>> v = load2(x);
  return {logits.term(v.a, m), logits.term(v.b, m)};
}

// Σ of the terms, logits without softcap. They are kept for backward if kKeep: whole pairs as terms2 gives them, then
// the rest.
template <bool kKeep, class T, class L>
[[gnu::flatten]] inline Acc<T> block_sum(const T* x, int64_t n, int64_t own, Acc<T> m, const L& logits, Acc<T>* kept) {
  const Vec<T> reference = splat<Vec<T>>(m);
  Vec<T> sum[4] = {};
  for_vectors(x, n, own, [&](int k, int64_t i, Vec<T> v, int64_t, auto used) {
    const Vec<T> t = logits.term(v, reference);
    if (kKeep) store(kept + i, t);
    sum[k] += chosen(used, t);
  });
  return reduce_add((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

// The sums of a block by sum(m), against the row's reference where that serves, else against its own.
template <class T, class L, class Sum>
inline BlockSum block_sums_by(const T* x, int64_t n, Acc<T> row_reference, const L& logits, const Sum& sum) {
  using A = Acc<T>;
  const A low = -std::numeric_limits<A>::infinity();
  if (row_reference != low) {
    const BlockSum s = sum(row_reference);
    if (s.sum <= 16 * kBlock) return s;
  }
  const A m = logits.cap(splat<Vec<T>>(block_max(x, n)))[0];
  BlockSum s = sum(m != low ? m : A(0));
  s.m = m;  // -inf alone adds 0, and NaN is seen
  return s;
}

template <bool kKeep = false, class T, class L>
inline BlockSum block_exp_sum(const T* x, int64_t n, int64_t own, Acc<T> row_reference, const L& logits,
                              Acc<T>* kept = nullptr) {
  return block_sums_by(x, n, row_reference, logits, [&](Acc<T> m) {
    return BlockSum{double(m), double(block_sum<kKeep>(x, n, own, m, logits, kept))};
  });
}

// With softcap or coefficients, too: u(i, count) are those of elements [i, i + count). One vector at a time, in order:
// with tanh in it, more of them would not fit into registers.
template <class T, class L, class U>
[[gnu::flatten]] inline BlockSum block_linear_sum(const T* x, int64_t n, int64_t own, Acc<T> row_reference,
                                                  const L& logits, const U& u) {
  constexpr int kLanes = Accumulate<T>::kLanes;
  constexpr int64_t kShortSum = 32 * kLanes;  // terms of linear may be large and alike
  if (own < 0 || own >= n) own = -1;
  return block_sums_by(x, n, row_reference, logits, [&](Acc<T> m) {
    const Vec<T> reference = splat<Vec<T>>(m);
    BlockSum total = {double(m), 0};
    for (int64_t begin = 0; begin < n; begin += kShortSum) {
      Vec<T> sum = {}, linear = {}, mass = {};
      const auto add = [&](Vec<T> v, Vec<T> c, auto used) {
        const Vec<T> half = logits.half_difference(logits.cap(v), reference);
        sum += chosen(used, exp2<T>(half * logits.twice_scale));
        linear += chosen(used, c * half);
        mass += chosen(used, c);
      };
      const int64_t end = std::min(begin + kShortSum, n);
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
