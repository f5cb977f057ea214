// What operators that sum exponentials of logits tell their kernels. [plain]
#pragma once
#include <algorithm>
#include <cmath>
#include <limits>

#include "common/types.h"

namespace tse {

// log2(e) and its inverse, rounded to the type: the base of exp and log. Only differences feel the rounding.
template <class A>
constexpr A kLog2e = A(1.4426950408889634);
template <class A>
constexpr A kLn2 = A(1 / double(kLog2e<A>));

// The smallest normal number.
template <class A>
constexpr A kSmallest = std::numeric_limits<A>::min();
// The largest number instead of infinity.
template <class A>
constexpr double kLargest = double(std::numeric_limits<A>::max());
template <class A>
TSE_HOST_DEVICE inline A bounded(double v) {
  return A(v < kLargest<A> ? v : kLargest<A>);
}

// A temperature as a number of A, by which neither 0 nor -inf divided is NaN. NaN stays.
template <class A>
TSE_HOST_DEVICE inline double temperature_within(double t) {
  return t < double(kSmallest<A>) ? double(kSmallest<A>) : t > kLargest<A> ? kLargest<A> : t;
}

// s = slope · z with z = tanh(x / softcap), or z = x without softcap.
struct LogitTransform {
  double temperature = 1;
  double softcap = 0;  // 0: none

  TSE_HOST_DEVICE double slope() const { return (softcap > 0 ? softcap : 1) / temperature; }

  // exp(s - slope · m) = exp2((z - m) · exponent_scale). Subtracting first makes the exponent exact to a rounding for
  // logits of any size. The bound keeps 0 · scale at 0.
  template <class A>
  TSE_HOST_DEVICE A exponent_scale() const {
    return bounded<A>(slope() * double(kLog2e<A>));
  }
};

// log Σ exp(s) of Σ exp(s - slope · m).
TSE_HOST_DEVICE inline double lse_of(const LogitTransform& transform, double m, double sum) {
  return m * transform.slope() + log(sum);
}

// Part of a row. sum = Σ exp(s - slope · m); and for coefficients u that the operator chooses, linear = Σ u · (z - m)
// and mass = Σ u. m is the z of a logit of the row; -inf and 0: nothing was added.
struct BlockSum {
  double m;
  double sum;
  double linear = 0;
  double mass = 0;
};
constexpr int64_t kExpSumBlock = 4096;  // elements: what stays in L1

}  // namespace tse
