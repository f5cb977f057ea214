// Entmax of any alpha on CUDA: the power of p, the search for the threshold, the probabilities that follow from it, and
// their weights. [CUDA]
//
// As on the CPU (entmax_policy-inl.h): with c = alpha - 1 and d = max x - x, p = u^(1/c) of u = max(t - c d, 0), where
// t is such that Σ p = 1. Next to alpha = 1 and below, v = u - 1 stands for u, else v = u.
#pragma once
#include "common/cuda/logits.cuh"
#include "entmax/entmax.h"

namespace tse {

// p = u^(1/c), and p^(2 - alpha).
template <class A>
struct AlphaTerm {
  A p, slope;
};
template <class A, class V>
__device__ inline AlphaTerm<A> alpha_term(V v, bool near_one, V inverse) {
  const V u = near_one ? v + 1 : v;
  if (u < kSmallest<V> || u > V(kLargest<V>)) return {0, 0};  // NaN stays
  const bool is_close = near_one && v >= V(-0.25) && v < V(1.0 / 3);
  const V p = exp2_of((is_close ? V(log1p(v)) * kLog2e<V> : V(log2(u))) * inverse);
  if constexpr (std::is_same_v<A, V>) return {p, p / u};
  else return {A(p), bounded<A>(p / u)};
}
// In double, one copy for a kernel: these functions are long.
template <class A>
__device__ TSE_NOINLINE AlphaTerm<A> alpha_term_in_double(double v, bool near_one, double inverse) {
  return alpha_term<A>(v, near_one, inverse);
}

template <class A>
struct AnyAlpha {
  double c, inverse;
  bool near_one;
  double power_of_n;  // v of n equal elements

  __device__ AnyAlpha(double alpha, float log_n) {
    c = alpha - 1;
    const bool is_double = std::is_same_v<A, double> || is_steep();
    const double least = std::is_same_v<A, double> ? 0x1p-60 : 0x1p-40,
                 most = (is_double ? 693 : 69) / double(log_n > 0.5f ? log_n : 0.5f);
    if (fabs(c) < least) c = least;  // the limit to a rounding
    if (c > most) c = most;  // of n equal elements u must be a normal number
    near_one = c < 0.25;
    inverse = 1 / c;
    const double power = -c * double(log_n);
    power_of_n = near_one ? expm1(A(power)) : is_double ? exp(power) : double(exp(A(power)));
  }

  // alpha > 2: u^(1/c) is vertical at 0, so that a rounding of t or of Σ p is seen in small p. All is in double then.
  __device__ bool is_steep() const { return c > 1; }
  __device__ double of_one() const { return near_one ? 0 : 1; }
  // A little beyond the t of n equal elements, as power_of_n is rounded. The threshold is between t = 1 and this.
  __device__ double other_bound() const { return power_of_n * (near_one ? 1 + 1e-4 : 1 - 1e-4); }

  __device__ AlphaTerm<A> term(float v) const { return alpha_term<A>(v, near_one, float(inverse)); }
  __device__ AlphaTerm<A> term(double v) const { return alpha_term_in_double<A>(v, near_one, inverse); }

  // f - f^(1 - c) of f = Σ p: Newton's step for f^c = 1 is t - numerator / Σ p^(2 - alpha). Near f = 1, c (f - 1).
  __device__ double numerator(double f) const {
    if (fabs(f - 1) < 1.0 / 16) return c * (f - 1);
    return -f * double(expm1(float(-c) * log(float(f))));
  }
};

// Newton's steps between bounds that every sum makes closer. Only a sum that is 1 to its rounding ends them, and one
// step more; or bounds between which there is no number.
template <class A>
struct AlphaSearch {
  double t, low, high;
  bool goes_on = true;

  __device__ AlphaSearch(const AnyAlpha<A>& alpha, double start)
      : t(start), low(fmin(alpha.of_one(), alpha.other_bound())), high(fmax(alpha.of_one(), alpha.other_bound())) {}

  __device__ void step(const AnyAlpha<A>& alpha, double f, double slope, bool bisects, double tolerance) {
    const bool is_close = fabs(f - 1) <= tolerance;
    goes_on = f > 0 && !is_close;
    if (!(f > 0)) {  // of nothing but -inf; or NaN
      t = f != f ? f : t;
      return;
    }
    if (f != 1) ((f > 1) == (alpha.c > 0) ? high : low) = t;
    const double newton = t - alpha.numerator(f) / slope, middle = (low + high) / 2;
    if (is_close) {
      t = newton < low ? low : newton > high ? high : newton;
    } else if (low < newton && newton < high && !bisects) {
      t = newton;
    } else {
      goes_on = low < middle && middle < high;
      if (goes_on) t = middle;
    }
  }
};

// From the elements of a row to their v = t - c d.
template <class A>
struct Shift {
  double slope;  // c / temperature
  A max, factor, hi, lo;
  double t;

  __device__ Shift(const AnyAlpha<A>& alpha, A max, double temperature)
      : slope(alpha.c / temperature),
        max(max),
        factor(fmax(bounded<A>(fabs(2 * slope)), kSmallest<A>) * (slope < 0 ? -1 : 1)) {}
  __device__ void set(double to) {
    t = to;
    hi = A(to);
    lo = A(to - double(hi));
  }
  // t as a RowThreshold holds it: in two numbers of A.
  __device__ double rounded_t() const { return double(hi) + double(lo); }
  __device__ A v(A x) const { return (hi - fma(max, A(0.5), A(-0.5) * x) * factor) + lo; }
  __device__ AlphaTerm<A> term(const AnyAlpha<A>& alpha, A x) const {
    if (alpha.is_steep()) return alpha.term(t - (double(max) - double(x)) * slope);
    return alpha.term(v(x));
  }
};

// The p of a row's elements, from its threshold.
template <class A>
struct RowProbabilities {
  AnyAlpha<A> alpha;
  Shift<A> shift;
  A scale;

  __device__ RowProbabilities(double alpha, float log_n, const RowThreshold<A>& row)
      : alpha(alpha, log_n), shift(this->alpha, row.max, /*temperature=*/1), scale(row.scale) {
    shift.set(double(row.t) + double(row.rest));
  }
  __device__ A operator()(A x) const {
    if (alpha.c != 0.5 && alpha.c != 1) return shift.term(alpha, x).p * scale;
    const A u = shift.v(x);
    return u <= 0 ? A(0) : alpha.c == 1 ? u : u * u;  // NaN stays
  }
};

// p^(2 - alpha), for backward.
template <class A>
struct AlphaWeights {
  static constexpr bool kCounts = false;
  A c = 0;
  __device__ A weight(A p) const {
    if (p < kSmallest<A>) return 0;
    return p * exp2_of(-c * A(log2(p)));
  }
};

}  // namespace tse
