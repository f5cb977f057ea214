// Σ exp over parts of a row, joined without rounding of the reference point: forward's statistics. [CUDA]
#pragma once
#include "common/cuda/vec.cuh"

namespace tse {

template <class A>
constexpr A kLog2e = A(1.4426950408889634);

__device__ inline float exp2_of(float x) { return fast_exp2(x); }
__device__ inline double exp2_of(double x) { return exp2(x); }

// Σ exp2(x · L) = sum · 2^m with an integer m, L = log2(e) in the type. m = -inf: nothing but -inf was added, or NaN,
// which sum then shows.
template <class A>
struct ExpSum {
  A m = -infinity<A>();
  A sum = 0;
};

template <class A>
__device__ inline ExpSum<A> join(ExpSum<A> a, ExpSum<A> b) {
  const A m = a.m > b.m ? a.m : b.m;
  // Equal reference points, infinite ones included, need no scaling.
  const A sa = a.m == m ? a.sum : a.sum * exp2_of(a.m - m), sb = b.m == m ? b.sum : b.sum * exp2_of(b.m - m);
  return {m, sa + sb};
}

// exp2(x · L - m), the term of one logit. The fused multiply-add rounds once, the difference: m is near x · L.
template <class A>
__device__ inline A term_of(A x, A m) {
  return exp2_of(fma(x, kLog2e<A>, -m));
}

// Adds count logits: one exp2 each, and one for the scaling.
template <int kCount, class T, class A>
__device__ inline void add(ExpSum<A>& s, const T* x) {
  A max = -infinity<A>();
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
    const A v = to_acc(x[k]);
    max = v > max ? v : max;
  }
  const A m = ceil(max * kLog2e<A>);
  if (m > s.m) {
    s.sum = s.m == -infinity<A>() ? s.sum : s.sum * exp2_of(s.m - m);
    s.m = m;
  }
  const A reference = s.m == -infinity<A>() ? A(0) : s.m;
#pragma unroll
  for (int k = 0; k < kCount; ++k) s.sum += term_of(A(to_acc(x[k])), reference);
}

// -log p of a target with logit x. One that has nearly all of the probability is compared with the sum in the sum's own
// arithmetic, so that a loss that must be 0 is 0.
template <class A>
__device__ inline A loss_of(const ExpSum<A>& s, A x) {
  const A t = fma(x, kLog2e<A>, -s.m), term = exp2_of(t);
  const A loss = term > s.sum * A(0.25) ? log2(s.sum / term) : log2(s.sum) - t;
  return loss < 0 ? A(0) : loss * A(1 / double(kLog2e<A>));
}

}  // namespace tse
