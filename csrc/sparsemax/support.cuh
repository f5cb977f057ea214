// Sums over the support of a row, and the search for its threshold. [CUDA]
#pragma once
#include "common/cuda/vec.cuh"

namespace tse {

template <class S>
struct SupportTotal {
  S sum;
  std::conditional_t<std::is_same_v<S, double>, int64_t, int> count;
};
template <class S>
__device__ inline SupportTotal<S> join(const SupportTotal<S>& a, const SupportTotal<S>& b) {
  return {a.sum + b.sum, a.count + b.count};
}

// What a thread adds: up to kPart values in A, and their sums in double.
template <class A>
class SupportSum {
  static constexpr int kPart = 32;

 public:
  __device__ void add(A value) {
    part_ += value;
    ++in_part_;
  }
  // Called after every few elements.
  __device__ void join_part() {
    if (in_part_ < kPart) return;
    total_ = total();
    part_ = 0;
    in_part_ = 0;
  }
  template <class S = double>
  __device__ SupportTotal<S> total() const {
    return {S(total_.sum + double(part_)), decltype(SupportTotal<S>::count)(count())};
  }
  __device__ int64_t count() const { return total_.count + in_part_; }

 private:
  A part_ = 0;
  int in_part_ = 0;
  SupportTotal<double> total_ = {0, 0};
};

// What the sums of a row's threads are added in: of few elements in A, else in double.
template <class T, int kRowThreads, int kVectors>
using SumOf = std::conditional_t<(kVectors > 0 && kRowThreads * kVectors * Vec<T>::kSize <= 1024), Acc<T>, double>;

// A sum of probabilities this close to 1 is one but for the rounding of its parts.
template <class A>
constexpr A kSumTolerance = std::is_same_v<A, double> ? A(0x1p-40) : A(0x1p-17);

// tau of p = (x - tau)_+ with Σ p = 1, relative to the largest x and as the sum of two numbers: in a support of 10^5
// elements of 10^-5 the rounding of one would show in Σ p.
template <class A>
struct Threshold {
  A t = -1, rest = 0;

  __device__ A above(A x) const { return (x - t) - rest; }  // x: relative to the largest
};

// Newton's steps for Σ (x - tau)_+ = 1, from the lowest threshold. The sum is convex, so that each step, also one from
// above, leads to a lower bound of the threshold, but for rounding: of a million ties it may miss all of them. What is
// known on both sides bounds the steps, and only the sum ends them.
template <class A>
struct ThresholdSearch : Threshold<A> {
  double low = -1, high = 0;
  bool goes_on = true;

  // `s`: Σ (x - tau)_+ and its terms; of a row of -inf alone 0. NaN ends the search, too.
  __device__ void step(const SupportTotal<double>& s) {
    const double tau = value(), next = tau + (s.sum - 1) / double(s.count > 1 ? s.count : 1);
    goes_on = s.count > 0 && fabs(s.sum - 1) > double(kSumTolerance<A>);
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
