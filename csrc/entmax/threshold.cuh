// Sparsemax and entmax15: what depends on alpha, and the search for the threshold of a row. [CUDA]
//
// For z = (alpha - 1) (x - max), p = (z - tau)_+^(1 / (alpha - 1)) with Σ p = 1. On the support p^(2 - alpha) is
// alpha - 1 times the slope of p in -tau, and the weight of an element in the gradient. A policy has:
//   scale               alpha - 1
//   reach               1 / (alpha - 1): an element so far below the largest has no probability
//   kCounts             slopes and weights are 1, so that their sums are counts
//   z(x, m)             scale (x - m)
//   probability(above)  p, where above = z - tau > 0
//   slope(above)        p^(2 - alpha)
//   weight(p)           p^(2 - alpha)
#pragma once
#include "common/cuda/support_sum.cuh"
#include "common/exp_sum.h"

namespace tse {

template <class A>
struct SparsemaxPolicy {  // alpha = 2
  static constexpr A scale = 1, reach = 1;
  static constexpr bool kCounts = true;
  __device__ static A z(A x, A m) { return x - m; }
  __device__ static A probability(A above) { return above; }
  __device__ static A slope(A) { return 1; }
  __device__ static A weight(A) { return 1; }
};

template <class A>
struct Entmax15Policy {  // alpha = 1.5
  static constexpr A scale = 0.5, reach = 2;
  static constexpr bool kCounts = false;
  __device__ static A z(A x, A m) { return fma(x, scale, -scale * m); }  // halves are exact
  __device__ static A probability(A above) { return above * above; }
  __device__ static A slope(A above) { return above; }
  __device__ static A weight(A p) { return fast_sqrt(p); }
};

// A policy for logits that are yet to be divided by a temperature.
template <class A, class Policy>
struct Sloped : Policy {
  A factor, reach;
  __device__ Sloped(const Policy& policy, double temperature)
      : Policy(policy),
        factor(bounded<A>(2 * double(Policy::scale) / temperature)),
        reach(bounded<A>((1 + 0x1p-20) * double(Policy::reach) * temperature)) {}
  __device__ A z(A x, A m) const { return fma(x, A(0.5), A(-0.5) * m) * factor; }  // half of a difference is finite
};

// ---- the threshold --------------------------------------------------------------------------------------------------

// A sum of probabilities this close to 1 is one but for the rounding of its parts, and Newton's step from there leaves
// an error of its square.
template <class A>
constexpr A kSumTolerance = std::is_same_v<A, double> ? A(0x1p-40) : A(0x1p-17);

// tau as the sum of two numbers: in a support of 10^5 elements of 10^-5 the rounding of one would show in Σ p. At the
// lowest the largest element has all of the probability.
template <class A>
struct Threshold {
  A t = -1, rest = 0;

  __device__ A above(A z) const { return (z - t) - rest; }
};

// Newton's step from a threshold of which Σ p and Σ p^(2 - alpha) are known. The latter is at least 1 where Σ p is.
template <class S, bool kCounts>
__device__ inline S newton_step(const SupportTotal<S, kCounts>& s, S scale) {
  return scale * (s.sum - 1) / S(s.weight > 1 ? s.weight : 1);
}
// Newton's steps for Σ p = 1. The sum is convex in tau, so that each step, also one from above, leads to a lower bound
// of the threshold, but for rounding: of a million ties it may miss all of them. What is known on both sides bounds the
// steps, and only the sum ends them.
template <class A>
struct ThresholdSearch : Threshold<A> {
  double low = -1, high = 0;
  bool goes_on = true;

  // Of a row of -inf alone the weight is 0; NaN ends the search, too.
  template <bool kCounts>
  __device__ void step(const SupportTotal<double, kCounts>& s, double scale) {
    const double tau = value(), next = tau + newton_step(s, scale);
    goes_on = s.weight > 0 && fabs(s.sum - 1) > double(kSumTolerance<A>);
    if (!goes_on) return set(next);
    (s.sum > 1 ? low : high) = tau;
    set(low < next && next < high ? next : (low + high) / 2);
    goes_on = low < value() && value() < high;
  }

 private:
  __device__ double value() const { return double(this->t) + double(this->rest); }
  __device__ void set(double tau) {
    this->t = A(tau);
    this->rest = A(tau - double(this->t));
  }
};

}  // namespace tse
