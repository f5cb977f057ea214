// The exponent of a logit, for forward and backward. [CUDA]
#pragma once
#include "common/cuda/vec.cuh"
#include "selective_log_softmax/selective_log_softmax.h"

namespace tse {

__device__ inline float exp2_term(float t) { return fast_exp2(t); }
__device__ inline double exp2_term(double t) { return exp2(t); }

template <class A>
struct Exponent {
  A scale, cap, inverse_cap;
  __device__ explicit Exponent(const LogitTransform& t)
      : scale(A((t.softcap > 0 ? t.softcap : 1) * double(kLog2e<A>) / t.temperature)),
        cap(A(t.softcap)),
        inverse_cap(t.softcap > 0 ? A(1 / t.softcap) : A(0)) {}

  __device__ A capped(A x) const { return cap > 0 ? A(tanh(x * inverse_cap)) : x; }
  // s · log2(e) - m of a capped logit. The fused multiply-add rounds once, the difference: m is near the product.
  __device__ A operator()(A capped, A m) const {
    const A t = fma(capped, scale, -m);
    return t < kLowestExponent<A> ? kLowestExponent<A> : t;  // so that -inf times 0 is 0; NaN stays
  }
};

}  // namespace tse
