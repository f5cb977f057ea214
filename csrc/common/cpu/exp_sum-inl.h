// Σ exp over rows, block by block. [per ISA]
//
// exp is taken in base 2 against an integer reference m, so that x · log2(e) - m is one fused multiply-add that rounds
// only the difference, and sums with different references are joined by powers of two, without rounding. The reference
// is ≥ the maximum of the row's first elements, and all blocks keep it without looking for their own maximum: terms may
// well be above 1, and a block whose sum shows that it is not near the reference is added up again with its own.
#include "common/cpu/math-inl.h"

constexpr int64_t kBlock = kExpSumBlock;
constexpr int64_t kReference = 512;  // elements whose maximum is the row's reference; terms of a short sum
constexpr BlockSum kNothing = {-std::numeric_limits<double>::infinity(), 0};

inline BlockSum join(BlockSum a, BlockSum b) {
  if (b.m > a.m) std::swap(a, b);
  if (b.sum != 0) a.sum += a.m == b.m ? b.sum : b.sum * std::exp2(b.m - a.m);  // infinite m with sum 0 says nothing
  a.linear += b.linear + (std::isfinite(b.m) ? (b.m - a.m) * b.mass : 0);
  a.mass += b.mass;
  return a;
}

// A logit on its way to the exponent. Without softcap, which is known beforehand, the functions below are short.
template <class T, bool kMayCap = true>
struct Logits {
  using A = Acc<T>;
  Vec<T> scale, inverse_cap;
  bool capped;
  explicit Logits(const LogitTransform& t)
      : scale(splat<Vec<T>>(A((t.softcap > 0 ? t.softcap : 1) * double(kLog2e<A>) / t.temperature))),
        inverse_cap(splat<Vec<T>>(t.softcap > 0 ? A(1 / t.softcap) : A(0))),
        capped(kMayCap && t.softcap > 0) {}

  // s · log2(e) - m of logits without softcap.
  Vec<T> exponent(Vec<T> v, Vec<T> m) const { return multiply_subtract(v, scale, m); }
  Vec<T> term(Vec<T> v, Vec<T> m) const { return exp2<T>(exponent(v, m)); }

  Vec<T> cap(Vec<T> v) const {
    if constexpr (!kMayCap) return v;
    return capped ? tanh(v * inverse_cap) : v;
  }
  // Of one logit, in all lanes, with the bits that it has in the sum.
  Vec<T> exponent_of(const T* x, A m) const { return exponent(cap(splat<Vec<T>>(load_one(x))), splat<Vec<T>>(m)); }
  A term_of(const T* x, A m) const { return exp2<T>(exponent_of(x, m))[0]; }
  A reference(A max) const {
    if constexpr (!kMayCap) return std::ceil(max * scale[0]);
    return std::ceil(exponent(cap(splat<Vec<T>>(max)), Vec<T>{})[0]);
  }
  Vec<T> references(Vec<T> max) const { return ceil(max * scale); }  // of logits without softcap
};

template <class T, class L>
inline Acc<T> row_reference(const T* x, int64_t n, const L& logits) {
  return logits.reference(block_max(x, std::min(kReference, n)));
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
[[gnu::flatten]] inline Acc<T> block_sum(const T* x, int64_t n, Acc<T> m, const L& logits, Acc<T>* kept) {
  using A = Acc<T>;
  constexpr int kLanes = Accumulate<T>::kLanes;
  const Vec<T> reference = splat<Vec<T>>(m);
  Vec<T> s0 = {}, s1 = {}, s2 = {}, s3 = {};
  const auto add = [&](int64_t i, Vec<T>& a, Vec<T>& b) {
    const Pair<Vec<T>> t = terms2(x + i, reference, logits);
    if (kKeep) store(kept + i, t.a), store(kept + i + kLanes, t.b);
    a += t.a;
    b += t.b;
  };
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
    add(i, s0, s1);
    add(i + 2 * kLanes, s2, s3);
  }
  if (i + 2 * kLanes <= n) add(i, s0, s1), i += 2 * kLanes;
  for (; i < n; i += kLanes) {
    const Vec<T> v = i + kLanes <= n ? load(x + i) : load_part(x + i, n - i, -std::numeric_limits<A>::infinity());
    const Vec<T> t = logits.term(v, reference);
    if (kKeep) store(kept + i, t);
    s0 += t;
  }
  return reduce_add((s0 + s1) + (s2 + s3));
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
  const A m = logits.reference(block_max(x, n));
  BlockSum s = sum(m != low ? m : A(0));
  s.m = m;  // -inf alone adds 0, and NaN is seen
  return s;
}

template <bool kKeep = false, class T, class L>
inline BlockSum block_exp_sum(const T* x, int64_t n, Acc<T> row_reference, const L& logits, Acc<T>* kept = nullptr) {
  return block_sums_by(x, n, row_reference, logits,
                       [&](Acc<T> m) { return BlockSum{double(m), double(block_sum<kKeep>(x, n, m, logits, kept))}; });
}

// With softcap or coefficients, too: u(i, count) are those of elements [i, i + count).
template <class T, class L, class U>
[[gnu::flatten]] inline BlockSum block_linear_sum(const T* x, int64_t n, Acc<T> row_reference, const L& logits,
                                                  const U& u) {
  using A = Acc<T>;
  constexpr int kLanes = Accumulate<T>::kLanes;
  return block_sums_by(x, n, row_reference, logits, [&](A m) {
    BlockSum total = {double(m), 0};
    for (int64_t begin = 0; begin < n; begin += kReference) {  // terms of linear may be large and alike: short sums
      Vec<T> sum = {}, linear = {}, mass = {};
      const auto add = [&](Vec<T> v, Vec<T> c, int64_t count) {
        const Vec<T> t = logits.exponent(logits.cap(v), splat<Vec<T>>(m));
        sum += first_lanes(exp2<T>(t), count);
        linear += first_lanes(c * t, count);
        mass += c;
      };
      const int64_t end = std::min(begin + kReference, n);
      int64_t i = begin;
      for (; i + kLanes <= end; i += kLanes) add(load(x + i), u(i, kLanes), kLanes);
      if (i < end) add(load_part(x + i, end - i, A(0)), u(i, end - i), end - i);
      total.sum += double(reduce_add(sum));
      total.linear += double(reduce_add(linear));
      total.mass += double(reduce_add(mass));
    }
    return total;
  });
}
