// Σ exp over parts of a row, joined without rounding of the reference point: forward's statistics. [CUDA]
#pragma once
#include "common/cuda/logits.cuh"

namespace tse {

// With t = s · log2(e) - m of the logits added: sum = Σ 2^t, and for coefficients u, with kLinear, linear = Σ u t,
// mass = Σ u. m is an integer; -inf: nothing but -inf was added, or NaN, which sum then shows.
template <class A, bool kLinear>
struct ExpSum;

template <class A>
struct ExpSum<A, false> {
  A m = -infinity<A>();
  A sum = 0;

  __device__ void raise_reference(A to) {
    if (m != -infinity<A>()) sum *= exp2_of(m - to);
    m = to;
  }
  __device__ void add(const ExpSum& other) { sum += other.sum; }
};

template <class A>
struct ExpSum<A, true> {
  A m = -infinity<A>();
  A sum = 0;
  A linear = 0;
  A mass = 0;

  __device__ void raise_reference(A to) {
    if (m != -infinity<A>()) {
      sum *= exp2_of(m - to);
      linear += (m - to) * mass;
    }
    m = to;
  }
  __device__ void add(const ExpSum& other) {
    sum += other.sum;
    linear += other.linear;
    mass += other.mass;
  }
};

template <class A, bool kLinear>
__device__ inline ExpSum<A, kLinear> join(ExpSum<A, kLinear> a, ExpSum<A, kLinear> b) {
  // Equal reference points, infinite ones included, need no scaling.
  const A m = a.m > b.m ? a.m : b.m;
  if (a.m != m) a.raise_reference(m);
  if (b.m != m) b.raise_reference(m);
  a.add(b);
  return a;
}

// Adds kCount logits, capped: one exp2 each, and one for the scaling; with their coefficients where u is one.
template <int kCount, class A, bool kLinear, class U>
__device__ inline void add(ExpSum<A, kLinear>& s, const A* x, const Logits<A>& logits, const U& u) {
  A max = -infinity<A>();
#pragma unroll
  for (int k = 0; k < kCount; ++k) max = fmax(x[k], max);  // passes NaN by
  const A m = ceil(logits.exponent(max, A(0)));
  if (m > s.m) s.raise_reference(m);
  const A reference = s.m == -infinity<A>() ? A(0) : s.m;
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
    const A t = logits.exponent(x[k], reference);
    s.sum += exp2_of(t);
    u(k, t);
  }
}

}  // namespace tse
