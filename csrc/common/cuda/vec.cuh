// Element types and 16-byte access. [CUDA]
#pragma once
#include <type_traits>

#include "common/cuda/launch.h"
#include "common/types.h"

namespace tse {

using Half = __half;
using BFloat16 = __nv_bfloat16;

// What the arithmetic for storage type T is done in.
template <class T>
using Acc = std::conditional_t<std::is_same_v<T, double>, double, float>;

__device__ inline float to_acc(float x) { return x; }
__device__ inline double to_acc(double x) { return x; }
__device__ inline float to_acc(__half x) { return __half2float(x); }
__device__ inline float to_acc(__nv_bfloat16 x) { return __bfloat162float(x); }

template <class T>
__device__ inline T from_acc(Acc<T> x) {
  if constexpr (std::is_same_v<T, __half>) return __float2half_rn(x);
  else if constexpr (std::is_same_v<T, __nv_bfloat16>) return __float2bfloat16_rn(x);
  else return x;
}

template <class A>
constexpr __device__ A infinity() {
  return A(__builtin_huge_val());
}

template <class T>
struct alignas(16) Vec {
  static constexpr int kSize = 16 / sizeof(T);
  T v[kSize];
};

template <class To, class From>
__device__ inline To bits_as(const From& from) {
  union {
    From from;
    To to;
  } u = {from};
  return u.to;
}
template <class T>
__device__ inline Vec<T> load_vec(const T* p) {
  return bits_as<Vec<T>>(load16(p));
}
template <class T>
__device__ inline void store_vec(T* p, const Vec<T>& v) {
  store16(p, bits_as<uint4>(v));
}

// The largest element, NaN aside; of 16-bit types two at a time.
template <class T>
__device__ inline Acc<T> max_of(const Vec<T>& v) {
  if constexpr (sizeof(T) == 2) {
    using Two = std::conditional_t<std::is_same_v<T, __half>, __half2, __nv_bfloat162>;
    struct Four {
      Two v[4];
    };
    const Four pairs = bits_as<Four>(v);
    const Two max = max_of_pairs(max_of_pairs(pairs.v[0], pairs.v[1]), max_of_pairs(pairs.v[2], pairs.v[3]));
    return fmax(to_acc(max.x), to_acc(max.y));
  } else {
    Acc<T> max = v.v[0];
#pragma unroll
    for (int k = 1; k < Vec<T>::kSize; ++k) max = fmax(v.v[k], max);
    return max;
  }
}

}  // namespace tse
