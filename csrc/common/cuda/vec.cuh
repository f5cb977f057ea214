// Element types, 16-byte access with unaligned head and tail, and who works on which row. [CUDA]
#pragma once
#include <type_traits>

#include "common/cuda/launch.h"
#include "common/types.h"

namespace tse {

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

template <class T>
__device__ inline Vec<T> load_vec(const T* p) {
  union {
    uint4 raw;
    Vec<T> vec;
  } u = {load16(p)};
  return u.vec;
}
template <class T>
__device__ inline void store_vec(T* p, const Vec<T>& v) {
  union {
    Vec<T> vec;
    uint4 raw;
  } u = {v};
  store16(p, u.raw);
}

// ---- rows ---------------------------------------------------------------------------------------------------------
// kRowThreads threads share a row: a whole block, a warp (several rows a block), or one thread where the elements of a
// row are not neighbours in memory but rows are. 32-thread rows need no barrier, so warps may run out of rows apart.

constexpr int kSmallBlock = 128;  // threads of a block that holds several rows

template <int kRowThreads>
constexpr int kBlockThreads = kRowThreads > 32 ? kRowThreads : kSmallBlock;
template <int kRowThreads>
constexpr int kRowsPerBlock = kBlockThreads<kRowThreads> / kRowThreads;
// Registers for so many threads of a multiprocessor; arithmetic in double takes twice as many of them.
template <class T, int kRowThreads>
constexpr int kBlocksAtLeast = kResidentThreads / (std::is_same_v<T, double> ? 2 : 1) / kBlockThreads<kRowThreads>;

template <int kRowThreads>
__device__ inline int64_t first_row() {
  return int64_t(blockIdx.x) * kRowsPerBlock<kRowThreads> + threadIdx.x / kRowThreads;
}
template <int kRowThreads>
__device__ inline int64_t row_step() {
  return int64_t(gridDim.x) * kRowsPerBlock<kRowThreads>;
}

// Elements before the first 16-byte boundary at or behind p.
template <class T>
__device__ inline int64_t unaligned_head(const T* p, int64_t n) {
  const int64_t head = (16 - reinterpret_cast<uintptr_t>(p) % 16) % 16 / sizeof(T);
  return head < n ? head : n;
}

// Walks this thread's part of a row: `vector(i, Vec<T>)` for 16 bytes at element i, `scalar(i, T)` for the elements of
// head and tail. With one thread per row all elements are scalar, `stride` apart.
template <int kRowThreads, class T, class Vector, class Scalar>
__device__ inline void for_each_in_row(const T* x, int64_t n, int64_t stride, const Vector& vector,
                                       const Scalar& scalar) {
  if constexpr (kRowThreads == 1) {
    for (int64_t i = 0; i < n; ++i) scalar(i, x[i * stride]);
  } else {
    constexpr int kSize = Vec<T>::kSize;
    const int64_t lane = threadIdx.x % kRowThreads;
    const int64_t head = unaligned_head(x, n), vectors = (n - head) / kSize, tail = head + vectors * kSize;
    if (lane < head) scalar(lane, x[lane]);
    for (int64_t i = lane; i < vectors; i += kRowThreads) vector(head + i * kSize, load_vec(x + head + i * kSize));
    if (tail + lane < n) scalar(tail + lane, x[tail + lane]);
  }
}

// The same walk over x, writing f(i, x[i]) to y[i]; by 16 bytes where both rows are aligned alike.
template <int kRowThreads, class T, class F>
__device__ inline void map_row(const T* x, int64_t x_stride, T* y, int64_t y_stride, int64_t n, const F& f) {
  const bool aligned_alike = (reinterpret_cast<uintptr_t>(x) ^ reinterpret_cast<uintptr_t>(y)) % 16 == 0;
  const auto scalar = [&](int64_t i, T v) { y[i * y_stride] = from_acc<T>(f(i, to_acc(v))); };
  const auto vector = [&](int64_t i, Vec<T> v) {
    if (!aligned_alike) {
      for (int k = 0; k < Vec<T>::kSize; ++k) scalar(i + k, v.v[k]);
      return;
    }
#pragma unroll
    for (int k = 0; k < Vec<T>::kSize; ++k) v.v[k] = from_acc<T>(f(i + k, to_acc(v.v[k])));
    store_vec(y + i, v);
  };
  for_each_in_row<kRowThreads>(x, n, x_stride, vector, scalar);
}

template <int kRowThreads, class T>
__device__ inline void zero_row(T* y, int64_t stride, int64_t n) {
  const T zero = from_acc<T>(0);
  const int64_t lane = threadIdx.x % kRowThreads;
  if (kRowThreads == 1 || stride != 1) {
    for (int64_t i = lane; i < n; i += kRowThreads) y[i * stride] = zero;
    return;
  }
  const int64_t head = unaligned_head(y, n), vectors = (n - head) / Vec<T>::kSize,
                tail = head + vectors * Vec<T>::kSize;
  if (lane < head) y[lane] = zero;
  for (int64_t v = lane; v < vectors; v += kRowThreads) store16(y + head + v * Vec<T>::kSize, uint4{0, 0, 0, 0});
  if (tail + lane < n) y[tail + lane] = zero;
}

// return launcher<T>(…) for the storage type.
#define TSE_LAUNCH_BY_DTYPE(p, launcher, ...)      \
  switch ((p).dtype) {                             \
    case DType::kFloat32:                          \
      return launcher<float>(__VA_ARGS__);         \
    case DType::kFloat64:                          \
      return launcher<double>(__VA_ARGS__);        \
    case DType::kFloat16:                          \
      return launcher<__half>(__VA_ARGS__);        \
    case DType::kBFloat16:                         \
      return launcher<__nv_bfloat16>(__VA_ARGS__); \
  }

}  // namespace tse
