// Sums over the support of a row: of values and of weights. [CUDA]
#pragma once
#include "common/cuda/vec.cuh"

namespace tse {

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

}  // namespace tse
