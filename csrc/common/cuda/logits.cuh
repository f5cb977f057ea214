// Softcap, temperature and base of logits, the reference of their exponents, and sums of terms. [CUDA]
#pragma once
#include "common/cuda/reduce.cuh"
#include "common/exp_sum.h"

namespace tse {

__device__ inline float exp2_of(float x) { return fast_exp2(x); }
__device__ inline double exp2_of(double x) { return exp2(x); }

// A sum and what its roundings left, so that its error does not grow with the number of terms.
// Two numbers of A, so that sums over long rows need no double, of which many GPUs compute little.
template <class A>
struct Compensated {
  A sum = 0, rest = 0;

  // Exact where the sum is the larger one; a term that is not, early in a row, has its own rounding.
  __device__ void add(A v) {
    const A s = sum + v;
    rest += v - (s - sum);
    sum = s;
  }
  // The same bits whichever of the two is added to the other.
  __device__ void add(const Compensated& other) {
    const A s = sum + other.sum, of_other = s - sum;
    rest = (rest + other.rest) + ((sum - (s - of_other)) + (other.sum - of_other));
    sum = s;
  }
  __device__ void scale(A factor) {
    sum *= factor;
    rest *= factor;
  }
  // Of an infinite sum `rest` is NaN.
  __device__ A value() const { return rest == rest ? sum + rest : sum; }
};

// Terms of a sum may be so large, in base 2, before the sum's reference is raised: raising is rare, and costs a
// rounding.
constexpr int kLargestExponent = 16;

// The m of Σ exp(s - slope · m), held as m / 2: half of a difference of finite logits is finite. A sum begins with
// none.
template <class A>
struct Reference {
  A half = 0;
  A limit = -infinity<A>();  // z above it raise m

  __device__ bool is_none() const { return limit == -infinity<A>(); }
  __device__ A m() const { return is_none() ? limit : 2 * half; }
  __device__ void set(A z, A margin) {
    if (z == -infinity<A>()) return;  // NaN goes in
    half = z * A(0.5);
    limit = z + margin;
  }
};

// A logit on its way to the exponent of base 2: z = tanh(x / softcap), or x.
template <class A>
struct Logits {
  A scale;   // of (z - m) / 2
  A margin;  // how much a z may be larger than m
  A slope, inverse_cap;
  bool capped;
  TSE_HOST_DEVICE explicit Logits(const LogitTransform& t)
      : scale(bounded<A>(2 * double(t.exponent_scale<A>()))),
        margin(2 * kLargestExponent / scale),
        slope(bounded<A>(t.slope())),
        inverse_cap(t.softcap > 0 ? A(1 / t.softcap) : A(0)),
        capped(t.softcap > 0) {}

  __device__ A cap(A x) const { return capped ? A(tanh(x * inverse_cap)) : x; }
  // (z - m) / 2
  __device__ A half_difference(A z, A half_m) const { return fma(z, A(0.5), -half_m); }
  __device__ A exponent(A z, A half_m) const { return half_difference(z, half_m) * scale; }
  __device__ A term(A z, A half_m) const { return exp2_of(exponent(z, half_m)); }
  // slope · (m - z), infinite only where that is.
  __device__ A below(A z, A half_m) const { return -half_difference(z, half_m) * slope * 2; }
  __device__ double lse(A m, A sum) const { return double(m) * double(slope) + double(log(sum)); }
};

// The largest of few numbers, NaN aside.
template <int kCount, class A>
__device__ inline A max_of(const A (&z)[kCount]) {
  A max = z[0];
#pragma unroll
  for (int k = 1; k < kCount; ++k) max = fmax(z[k], max);
  return max;
}

// Raises the reference of a sum before kCount z up to `max` are added, where they need it. Number `own` among them, if
// it is one, is left out of the sum: as -inf.
template <int kCount, class Sum, class A, class L>
__device__ inline void prepare(Sum& s, A (&z)[kCount], A max, int own, const L& logits) {
  if (max > s.limit || unsigned(own) < kCount) {
    if (max > s.limit) s.raise_reference(max, logits);
#pragma unroll
    for (int k = 0; k < kCount; ++k) z[k] = k == own ? -infinity<A>() : z[k];
  }
}

// The sum over the threads of a row, in every one of them. Their references are raised to the largest; then only sums
// are added, with s.add.
template <int kRowThreads, class Sum, class L>
__device__ inline Sum sum_of_threads(const Sum& s, int& turn, const L& logits) {
  return row_reduce_by<kRowThreads>(s, turn, [&](Sum of_lane, auto lanes) {
    constexpr int kLanes = decltype(lanes)::value;
    const auto m = lanes_reduce<kLanes>(of_lane.m(), [](auto a, auto b) { return a > b ? a : b; });
    if (of_lane.m() < m) of_lane.raise_reference(m, logits);
    of_lane.sums = lanes_reduce<kLanes>(of_lane.sums, [](auto a, const auto& b) {
      a.add(b);
      return a;
    });
    return of_lane;
  });
}

// -log p of a class that has `term` of the sum, and all others `others`: of a class with most of the sum the digits of
// a small loss, 0 without others, and never negative, as all logarithms are of 1 and more. below: slope · (m - z).
template <class A>
__device__ inline A negative_log(A term, A others, A sum, A below) {
  return 3 * others < term ? A(log1p(others / term)) : A(log(sum)) + below;
}

}  // namespace tse
