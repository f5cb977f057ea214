// The exponent of a logit, for forward and backward. [CUDA]
#pragma once
#include "common/cuda/logits.cuh"
#include "selective_log_softmax/selective_log_softmax.h"

namespace tse {

template <class A>
struct Exponent : Logits<A> {
  using Logits<A>::Logits;
  // Of a capped logit: s · log2(e) - m.
  __device__ A operator()(A x, A m) const {
    const A t = this->exponent(x, m);
    return t < kLowestExponent<A> ? kLowestExponent<A> : t;  // so that -inf times 0 is 0; NaN stays
  }
};

}  // namespace tse
