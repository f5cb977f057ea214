// Sparsemax and entmax: what depends on alpha, sums over the support of a row, the search for its threshold. [CUDA]
//
// For z = (alpha - 1) (x - max), p = (z - tau)_+^(1 / (alpha - 1)) with Σ p = 1. On the support p^(2 - alpha) is
// alpha - 1 times the slope of p in -tau, and the weight of an element in the gradient. A policy has:
//   scale               alpha - 1
//   kCounts             slopes and weights are 1, so that their sums are counts
//   z(x, m)             scale (x - m)
//   probability(above)  p, where above = z - tau > 0
//   slope(above)        p^(2 - alpha)
//   weight(p)           p^(2 - alpha)
#pragma once
#include "common/cuda/vec.cuh"

namespace tse {

template <class A>
struct SparsemaxPolicy {  // alpha = 2
  static constexpr A scale = 1;
  static constexpr bool kCounts = true;
  __device__ static A z(A x, A m) { return x - m; }
  __device__ static A probability(A above) { return above; }
  __device__ static A slope(A) { return 1; }
  __device__ static A weight(A) { return 1; }
};

template <class A>
struct Entmax15Policy {  // alpha = 1.5
  static constexpr A scale = 0.5;
  static constexpr bool kCounts = false;
  __device__ static A z(A x, A m) { return fma(x, scale, -scale * m); }  // halves are exact
  __device__ static A probability(A above) { return above * above; }
  __device__ static A slope(A above) { return above; }
  __device__ static A weight(A p) { return fast_sqrt(p); }
};

// ---- sums over the support ------------------------------------------------------------------------------------------

template <class S, bool kCounts>
struct SupportTotal {
  using Count = std::conditional_t<std::is_same_v<S, double>, int64_t, int>;
  S sum;
  std::conditional_t<kCounts, Count, S> weight;
};
struct Join {
  template <class Total>
  __device__ Total operator()(const Total& a, const Total& b) const {
    return {a.sum + b.sum, a.weight + b.weight};
  }
};

// What a thread adds: up to kPart values and weights in A, and their sums in double.
template <class A, bool kCounts>
class SupportSum {
  static constexpr int kPart = 32;

 public:
  __device__ void add(A value, A weight) {
    value_ += value;
    weight_ += weight;
    ++in_part_;
  }
  // Called after every few elements.
  __device__ void join_part() {
    if (in_part_ < kPart) return;
    sum_ += double(value_);
    weights_ += double(weight_);
    joined_ += in_part_;
    value_ = weight_ = 0;
    in_part_ = 0;
  }
  template <class S = double>
  __device__ SupportTotal<S, kCounts> total() const {
    const S sum = S(sum_ + double(value_));
    if constexpr (kCounts) return {sum, decltype(SupportTotal<S, true>::weight)(count())};
    else return {sum, S(weights_ + double(weight_))};
  }
  __device__ int64_t count() const { return joined_ + in_part_; }

 private:
  A value_ = 0, weight_ = 0;
  int in_part_ = 0;
  double sum_ = 0, weights_ = 0;
  int64_t joined_ = 0;
};

// What the sums of a row's threads are added in: of few elements in A, else in double.
template <class T, int kRowThreads, int kVectors>
using SumOf = std::conditional_t<(kVectors > 0 && kRowThreads * kVectors * Vec<T>::kSize <= 1024), Acc<T>, double>;

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
