// What differs between the maps with a threshold: the power of p, and Newton's step. [per ISA]
//
// With c = alpha - 1 and d = max x - x, p = u^(1/c) of u = max(t - c d, 0), where t is such that Σ p = 1 (Peters,
// Niculae & Martins 2019). t is u of the largest element. A policy has
//   terms(v)      p and p^(2 - alpha), which is dp/dt · c, of v = origin + t - c d
//   numerator(f)  f - f^(1 - c) of f = Σ p: Newton's step for f^c = 1 is t - numerator / Σ p^(2 - alpha). f^c is the
//                 norm of the u, which is convex in t, and linear in it where all u are alike: from t = 1 on the steps
//                 never pass the root, and of flat rows the first is the last.
//   weight(p)     p^(2 - alpha) on the support, for backward
#if defined(TSE_ENTMAX_POLICY_INL_H) == defined(TSE_ISA_TOGGLE)
#ifdef TSE_ENTMAX_POLICY_INL_H
#undef TSE_ENTMAX_POLICY_INL_H
#else
#define TSE_ENTMAX_POLICY_INL_H
#endif
#include "common/cpu/math-inl.h"
#include "common/cpu/rows-inl.h"

template <class V>
struct Terms {
  V p, slope;
};

// Where v is when n elements are equal: origin + n^-c. The threshold is between t = 1 and this.
template <class V>
inline V base_of_equal(V c, V origin, int64_t n) {
  V result = c;
  for (size_t i = 0; i < sizeof(V) / sizeof(c[0]); ++i) {
    const double power = -double(c[i]) * std::log(double(n));
    if (i > 0 && c[i] == c[i - 1]) result[i] = result[i - 1];
    else result[i] = decltype(result[0] + 0)(origin[i] != 0 ? std::expm1(power) : std::exp(power));
  }
  return result;
}

// alpha = 1.5, where p = u².
template <class T>
struct Entmax15 {
  using V = Vec<T>;
  static constexpr bool kIsCostly = false;  // to compute where p is 0
  V c = splat<V>(0.5), origin = {}, of_equal;
  Entmax15(V, int64_t n) : of_equal(base_of_equal(c, origin, n)) {}

  Terms<V> terms(V v) const {
    const V u = vmax(V{}, v);  // NaN stays
    return {u * u, u};
  }
  V numerator(V f) const { return f - vsqrt(f); }
  double numerator(double f) const { return f - std::sqrt(f); }
  auto is_steep() const { return c > c; }  // nowhere
  V weight(V p) const { return vsqrt(p); }
};

// Any alpha > 0, one for each lane. Where alpha is near 1, u is near 1, and where it is below 1, u is above: there v is
// u - 1. For alpha = 1 it is a number next to 1: the limit to a rounding.
template <class T>
struct AnyAlpha {
  using A = Acc<T>;
  using V = Vec<T>;
  using Mask = decltype(V{} > V{});
  static constexpr bool kIsCostly = true;
  V c, inverse, origin, of_equal;
  Mask near_one;

  AnyAlpha(V alpha, int64_t n) {
    c = alpha - A(1);
    const V size = vmax(c, -c), least = splat<V>(std::is_same_v<A, double> ? A(0x1p-60) : A(0x1p-40));
    c = size < least ? least : c;
    // Of n equal elements t = n^-c must be a normal number.
    const V most = splat<V>(A((std::is_same_v<A, double> ? 1000 : 100) / std::log2(double(std::max<int64_t>(n, 2)))));
    c = vmin(most, c);
    inverse = A(1) / c;
    near_one = c < A(0.25);
    origin = near_one ? splat<V>(-1) : V{};
    of_equal = base_of_equal(c, origin, n);
  }

  V log2_p(V v) const {
    const V u = near_one ? v + A(1) : v;
    return log2_1p_or(near_one & (v >= A(-0.25)) & (v < A(1.0 / 3)), v, u) * inverse;
  }
  Terms<V> terms(V v) const {
    const V u = near_one ? v + A(1) : v;
    const auto is_zero = (u < std::numeric_limits<A>::min()) | (u > std::numeric_limits<A>::max());
    const V p = is_zero ? V{} : exp2<T>(log2_p(v));
    return {p, is_zero ? V{} : p / u};  // NaN stays
  }
  // Near f = 1, c (f - 1); of small c, the first terms of the series.
  V numerator(V f) const {
    const V log2_f = log2(f), cl = c * log2_f * kLn2<A>, size = vmax(c, -c), away = vmax(f - A(1), A(1) - f);
    const V series = f * cl * (A(1) - cl * (A(0.5) - cl * A(1.0 / 6)));
    const V exact = f - exp2<T>((A(1) - c) * log2_f);
    return away < A(1.0 / 16) ? c * (f - A(1)) : size < A(1.0 / 64) ? series : exact;
  }
  double numerator(double f) const { return -f * std::expm1(-double(c[0]) * std::log(f)); }
  // alpha > 2: u^(1/c) is vertical at 0, so that Σ p is 1 only to what one rounding of t changes.
  Mask is_steep() const { return c > A(1); }
  V weight(V p) const {
    if (mask_above(p, A(0)) == 0) return V{};
    const V w = p * exp2<T>(-c * log2(p));
    return p < std::numeric_limits<A>::min() ? V{} : p == p ? w : p;
  }
  // p L² φ(-c L), L = log p and φ(t) = (e^t - 1 - t) / t², for the gradient of alpha. Next to t = 0 by the series of φ.
  V alpha_term(V p) const {
    constexpr int kLast = std::is_same_v<A, double> ? 20 : 12;
    const V log_p = log2(p) * kLn2<A>, t = -c * log_p;
    V series = splat<V>(1);
#pragma GCC unroll 20
    for (int k = kLast; k > 2; --k) series = series * t * A(1.0 / k) + A(1);
    const V near_zero = p * log_p * log_p * series * A(0.5);
    const V away = p * (exp2<T>(t * kLog2e<A>) - A(1) - t) / (c * c);
    const V of_support = vmax(t, -t) < A(1) ? near_zero : away;
    return p < std::numeric_limits<A>::min() ? V{} : p == p ? of_support : p;
  }
};
#endif
