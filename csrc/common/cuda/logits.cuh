// Softcap, temperature and base of logits. [CUDA]
#pragma once
#include "common/cuda/vec.cuh"
#include "common/exp_sum.h"

namespace tse {

__device__ inline float exp2_of(float x) { return fast_exp2(x); }
__device__ inline double exp2_of(double x) { return exp2(x); }

// A logit on its way to the exponent of base 2.
template <class A>
struct Logits {
  A scale, inverse_cap;
  bool capped;
  TSE_HOST_DEVICE explicit Logits(const LogitTransform& t)
      : scale(A((t.softcap > 0 ? t.softcap : 1) * double(kLog2e<A>) / t.temperature)),
        inverse_cap(t.softcap > 0 ? A(1 / t.softcap) : A(0)),
        capped(t.softcap > 0) {}

  __device__ A cap(A x) const { return capped ? A(tanh(x * inverse_cap)) : x; }
  // The fused multiply-add rounds once, the difference: m is near x · scale.
  __device__ A exponent(A x, A m) const { return fma(x, scale, -m); }
  __device__ A term(A x, A m) const { return exp2_of(exponent(x, m)); }
};

}  // namespace tse
