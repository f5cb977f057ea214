// What ring.cuh does with 16 bytes of logits: adds their exponentials, and makes their gradients. [CUDA]
#pragma once
#include <cstring>

#include "common/exp_sum.h"
#include "ring_sm90.cuh"

namespace ring {

using tse::from_acc;
using tse::to_acc;
using tse::Vec;

constexpr float kLog2e = tse::kLog2e<float>;

// sum = Σ 2^(x log2(e) - m). m is an integer once an element is added.
struct Sum {
  float m = -1e30f, sum = 0;

  __device__ void raise_above(float exponent) {
    if (!(exponent > m)) return;
    const float to = ceilf(exponent) + 8;  // so much more that it is seldom raised again
    sum *= tse::fast_exp2(m - to);
    m = to;
  }
  __device__ void add(float x) {
    raise_above(x * kLog2e);
    sum += term(x);
  }
  __device__ float term(float x) const { return tse::fast_exp2(fmaf(x, kLog2e, -m)); }
};

// 16 bytes as floats. Of bf16 a word has two, whose bits are the upper halves of floats'.
template <class T>
__device__ inline void unpack(const uint4& raw, float (&z)[Vec<T>::kSize]) {
  const unsigned words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    if constexpr (sizeof(T) == 4) {
      z[k] = __uint_as_float(words[k]);
    } else {
      z[2 * k] = __uint_as_float(words[k] << 16);
      z[2 * k + 1] = __uint_as_float(words[k] & 0xffff0000u);
    }
  }
}
template <class T>
__device__ inline uint4 pack(const float (&z)[Vec<T>::kSize]) {
  unsigned words[4];
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    if constexpr (sizeof(T) == 4) {
      words[k] = __float_as_uint(z[k]);
    } else {
      const __nv_bfloat162 pair = __floats2bfloat162_rn(z[2 * k], z[2 * k + 1]);
      memcpy(&words[k], &pair, 4);
    }
  }
  return {words[0], words[1], words[2], words[3]};
}

// Of kCount · 16 bytes. Of bf16 two elements at a time.
template <class T, int kCount>
__device__ inline float max_of(const uint4 (&raw)[kCount]) {
  if constexpr (sizeof(T) == 4) {
    float max = -tse::infinity<float>();
#pragma unroll
    for (const uint4& r : raw) {
      float z[4];
      unpack<T>(r, z);
      max = fmaxf(fmaxf(max, fmaxf(z[0], z[1])), fmaxf(z[2], z[3]));
    }
    return max;
  } else {
    __nv_bfloat162 pairs[4 * kCount];
    memcpy(pairs, raw, sizeof pairs);
    __nv_bfloat162 max = pairs[0];
#pragma unroll
    for (int k = 1; k < 4 * kCount; ++k) max = __hmax2(max, pairs[k]);
    return fmaxf(to_acc(max.x), to_acc(max.y));
  }
}

template <class T, int kCount>
__device__ inline void add(Sum& s, const uint4 (&raw)[kCount]) {
  s.raise_above(max_of<T>(raw) * kLog2e);
  float even = 0;
#pragma unroll
  for (const uint4& r : raw) {
    float z[Vec<T>::kSize];
    unpack<T>(r, z);
#pragma unroll
    for (int k = 0; k < Vec<T>::kSize; k += 2) {
      even += s.term(z[k]);
      s.sum += s.term(z[k + 1]);
    }
  }
  s.sum += even;
}

template <class T>
__device__ inline uint4 gradient(const Sum& s, float factor, const uint4& raw) {
  float z[Vec<T>::kSize];
  unpack<T>(raw, z);
#pragma unroll
  for (float& v : z) v = s.term(v) * factor;
  return pack<T>(z);
}

// Over kCount contiguous lanes, in every one of them, where all groups of so many lanes have the same sums.
template <int kCount>
__device__ inline Sum warp_sum(Sum s) {
  const float m = warp_max(s.m);
  s.sum *= tse::fast_exp2(s.m - m);
  s.m = m;
#pragma unroll
  for (int mask = kCount / 2; mask > 0; mask /= 2) s.sum += __shfl_xor_sync(0xffffffffu, s.sum, mask);
  return s;
}

}  // namespace ring
