// The exponent of a logit and the classes asked for, for forward and backward. [CUDA]
#pragma once
#include "common/cuda/logits.cuh"
#include "selective_log_softmax/selective_log_softmax.h"

namespace tse {

template <class A>
struct Exponent : Logits<A> {
  using Logits<A>::Logits;
  // (z - m) · exponent_scale
  __device__ A operator()(A z, A half_m) const { return bounded_below(this->exponent(z, half_m)); }
  static __device__ A bounded_below(A t) {
    return t < kLowestExponent<A> ? kLowestExponent<A> : t;  // so that -inf times 0 is 0; NaN stays
  }
};

__device__ inline int64_t asked_class(const SelectiveLogSoftmaxParams& p, int64_t row, int64_t k) {
  const int64_t c = index_of(p, row, k);
  device_assert(c >= 0 && c < p.rows.n, "selective_log_softmax: index: expected a class index in [0, C)");
  return c;
}

}  // namespace tse
