// A row as 16-byte vectors and the loose elements before and behind them; and which of a thread's vectors matter.
// [CUDA]
#pragma once
#include "common/cuda/vec.cuh"

namespace tse {

template <class T>
struct RowParts {
  static constexpr int kSize = Vec<T>::kSize;
  int64_t n;
  int head, vectors;
  __device__ RowParts(const T* row, int64_t n)
      : n(n), head(static_cast<int>(unaligned_head(row, n))), vectors(static_cast<int>((n - head) / kSize)) {}

  __device__ int64_t first(int v) const { return head + int64_t(v) * kSize; }  // element of vector v

  // The loose elements, head and tail, by number: which elements they are, -1 behind the last.
  __device__ int64_t loose(int number) const {
    const int64_t i = number < head ? number : number + int64_t(vectors) * kSize;
    return i < n ? i : -1;
  }

  // Vector v of p, a row like this one.
  __device__ Vec<T> load(const T* p, bool aligned_alike, int v) const {
    p += first(v);
    if (aligned_alike) return load_vec(p);
    Vec<T> result;
#pragma unroll
    for (int k = 0; k < kSize; ++k) result.v[k] = p[k];
    return result;
  }
  __device__ void store(T* p, bool aligned_alike, int v, const Vec<T>& value) const {
    p += first(v);
    if (aligned_alike) return store_vec(p, value);
#pragma unroll
    for (int k = 0; k < kSize; ++k) p[k] = value.v[k];
  }

  // Slots are the vectors, and behind them the loose elements in vectors of their own: as many as n elements need.
  __device__ Vec<T> load_slot(const T* p, bool aligned_alike, int slot, T fill) const {
    if (aligned_alike && slot < vectors) return load_vec(p + first(slot));
    Vec<T> result;
#pragma unroll
    for (int k = 0; k < kSize; ++k) {
      const int64_t i = element(slot, k);
      result.v[k] = i >= 0 ? p[i] : fill;
    }
    return result;
  }
  __device__ void store_slot(T* p, bool aligned_alike, int slot, const Vec<T>& value) const {
    if (aligned_alike && slot < vectors) return store_vec(p + first(slot), value);
#pragma unroll
    for (int k = 0; k < kSize; ++k) {
      const int64_t i = element(slot, k);
      if (i >= 0) p[i] = value.v[k];
    }
  }
  __device__ int64_t element(int slot, int k) const {
    return slot < vectors ? first(slot) + k : loose((slot - vectors) * kSize + k);
  }

  // kCount vectors of the row from v on, `step` apart, all under way before the first is used; `fill` behind the last.
  template <int kCount>
  __device__ void load_batch(const T* row, int v, int step, T fill, Vec<T> (&batch)[kCount]) const {
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      if (v + j * step < vectors) {
        batch[j] = load_vec(row + first(v + j * step));
      } else {
#pragma unroll
        for (int k = 0; k < kSize; ++k) batch[j].v[k] = fill;
      }
    }
  }
};

template <class T>
__device__ inline bool all_bits_zero(const Vec<T>& v) {
  union {
    Vec<T> vec;
    uint4 raw;
  } u = {v};
  return (u.raw.x | u.raw.y | u.raw.z | u.raw.w) == 0;
}

template <class T>
__device__ inline bool is_aligned_like(const T* a, const T* b) {
  return (reinterpret_cast<uintptr_t>(a) ^ reinterpret_cast<uintptr_t>(b)) % 16 == 0;
}

template <class T>
__device__ inline Vec<T> splat_vec(T value) {
  Vec<T> result;
#pragma unroll
  for (int k = 0; k < Vec<T>::kSize; ++k) result.v[k] = value;
  return result;
}

// One bit for each vector that a thread owns, or for 2, 4, … neighbours among them where it owns more than 64.
struct LiveVectors {
  uint64_t bits = 0;
  int shift = 0;
  __device__ explicit LiveVectors(int owned) {
    while (owned > 64 << shift) ++shift;
  }
  __device__ void add(int i) { bits |= uint64_t(1) << (i >> shift); }
  __device__ bool has(int i) const { return bits >> (i >> shift) & 1; }
};

}  // namespace tse
