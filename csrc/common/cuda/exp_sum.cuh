// Σ exp over a row, but for one element where an operator has its own class. [CUDA]
#pragma once
#include "common/cuda/logits.cuh"

namespace tse {

// sum = Σ exp(s - slope · m) of the logits added; for coefficients u, linear = Σ u · (z - m) / 2 and mass = Σ u.
template <class A, bool kLinear>
struct ExpSums {
  Compensated<A> sum;
  __device__ void add(const ExpSums& other) { sum.add(other.sum); }
};
template <class A>
struct ExpSums<A, true> {
  Compensated<A> sum, linear, mass;
  __device__ void add(const ExpSums& other) {
    sum.add(other.sum);
    linear.add(other.linear);
    mass.add(other.mass);
  }
};

template <class A, bool kLinear>
struct ExpSum : Reference<A> {
  ExpSums<A, kLinear> sums;

  __device__ void raise_reference(A to, const Logits<A>& logits) {
    if (!this->is_none()) {
      const A difference = logits.half_difference(this->m(), to * A(0.5));
      sums.sum.scale(exp2_of(difference * logits.scale));
      if constexpr (kLinear) sums.linear.add(difference * sums.mass.value());
    }
    this->set(to, logits.margin);
  }
};

// Adds kCount z up to `max` but for number `own`: one exp2 each; with their coefficients u(k).
template <int kCount, class A, bool kLinear, class U>
__device__ inline void add(ExpSum<A, kLinear>& s, A (&z)[kCount], A max, int own, const Logits<A>& logits, const U& u) {
  prepare(s, z, max, kLinear ? -1 : own, logits);
  A sum = 0, linear = 0, mass = 0;
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
    const A difference = logits.half_difference(z[k], s.half), term = exp2_of(difference * logits.scale);
    if constexpr (!kLinear) {
      sum = k == 0 ? term : sum + term;
    } else if (k != own) {
      const A coefficient = u(k);
      sum += term;
      linear = fma(coefficient, difference, linear);
      mass += coefficient;
    }
  }
  s.sums.sum.add(sum);
  if constexpr (kLinear) {
    s.sums.linear.add(linear);
    s.sums.mass.add(mass);
  }
}

}  // namespace tse
