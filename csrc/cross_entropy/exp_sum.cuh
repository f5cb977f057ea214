// Σ exp over the classes of a row but for the own one: forward's statistics. [CUDA]
#pragma once
#include "common/cuda/compensated.cuh"
#include "common/cuda/logits.cuh"

namespace tse {

// For coefficients u: linear = Σ u · (z - m) / 2, mass = Σ u.
template <class A, bool kLinear>
struct LinearSum {
  __device__ void move(A) {}
  __device__ void add(const LinearSum&) {}
};
template <class A>
struct LinearSum<A, true> {
  Compensated<A> linear, mass;

  __device__ void move(A half_difference) { linear.add(half_difference * mass.value()); }
  __device__ void add(const LinearSum& other) {
    linear.add(other.linear);
    mass.add(other.mass);
  }
};

// sum = Σ exp(s - slope · m) of the logits added.
template <class A, bool kLinear>
struct ExpSum : Reference<A> {
  Compensated<A> sum;
  LinearSum<A, kLinear> of_coefficients;

  __device__ void raise_reference(A to, const Logits<A>& logits) {
    if (!this->is_none()) {
      const A difference = logits.half_difference(this->m(), to * A(0.5));
      sum.scale(exp2_of(difference * logits.scale));
      of_coefficients.move(difference);
    }
    this->set(to, logits.margin);
  }
};

template <class A, bool kLinear>
__device__ inline ExpSum<A, kLinear> join(ExpSum<A, kLinear> a, ExpSum<A, kLinear> b, const Logits<A>& logits) {
  const A m = a.m() > b.m() ? a.m() : b.m();
  if (a.m() < m) a.raise_reference(m, logits);
  if (b.m() < m) b.raise_reference(m, logits);
  a.sum.add(b.sum);
  a.of_coefficients.add(b.of_coefficients);
  return a;
}

// Adds kCount z but for number `own`: one exp2 each; with their coefficients u(k).
template <int kCount, class A, bool kLinear, class U>
__device__ inline void add(ExpSum<A, kLinear>& s, A (&z)[kCount], int own, const Logits<A>& logits, const U& u) {
  prepare(s, z, kLinear ? -1 : own, logits);
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
  s.sum.add(sum);
  if constexpr (kLinear) {
    s.of_coefficients.linear.add(linear);
    s.of_coefficients.mass.add(mass);
  }
}

}  // namespace tse
