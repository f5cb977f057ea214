// A row that is read twice, and kept on chip in between. [CUDA]
#pragma once
#include "common/cuda/vec.cuh"

namespace tse {

constexpr int64_t kLongestKeptRow = int64_t(1) << 31;  // elements: vectors are counted in int

// The first `kept_vectors` vectors stay in shared memory, where each thread finds again what it wrote, so no barrier is
// needed; the others are read from memory again, from L2 as far as it reaches, and so are the few elements of an
// unaligned head and tail. With one thread per row nothing is kept. kLoads: 16-byte loads of a thread that are under
// way together; four are 64 KiB for a multiprocessor of 1024 threads.
template <int kRowThreads, class T, int kLoads = 4>
class KeptRow {
  static constexpr int kSize = Vec<T>::kSize;

 public:
  __device__ KeptRow(const T* x, int64_t n, int64_t stride, uint4* kept = nullptr, int kept_vectors = 0)
      : x_(x), n_(n), stride_(stride), kept_(kept), kept_vectors_(kept_vectors) {
    head_ = kRowThreads == 1 ? 0 : unaligned_head(x, n);
    vectors_ = kRowThreads == 1 ? 0 : int((n - head_) / kSize);
  }

  // The first reading: vector(i, 16 bytes at element i), scalar(i, one element). `again`: a second one will come.
  template <class Vector, class Scalar>
  __device__ void read(bool again, const Vector& vector, const Scalar& scalar) const {
    walk([&](int v, const T* p) { return again && v >= kept_vectors_ ? load16_again(p) : load16(p); },
         [&](int v, uint4 raw, const Vec<T>& elements) {
           if (v < kept_vectors_) kept_[v] = raw;
           vector(head_ + int64_t(v) * kSize, elements);
         },
         scalar);
  }

  // The last reading: y[i] = f(i, x[i]), by 16 bytes where both rows are aligned alike. y may be x.
  template <class F>
  __device__ void map(T* y, int64_t y_stride, const F& f) const {
    const bool aligned_alike = (reinterpret_cast<uintptr_t>(x_) ^ reinterpret_cast<uintptr_t>(y)) % 16 == 0;
    const auto scalar = [&](int64_t i, T v) { y[i * y_stride] = from_acc<T>(f(i, to_acc(v))); };
    walk([&](int v, const T* p) { return v < kept_vectors_ ? kept_[v] : load16(p); },
         [&](int v, uint4, const Vec<T>& elements) {
           const int64_t i = head_ + int64_t(v) * kSize;
           Vec<T> result;
#pragma unroll
           for (int k = 0; k < kSize; ++k) result.v[k] = from_acc<T>(f(i + k, to_acc(elements.v[k])));
           if (aligned_alike) return store_vec(y + i, result);
           for (int k = 0; k < kSize; ++k) y[i + k] = result.v[k];
         },
         scalar);
  }

  // Whether this thread is the one that meets element i.
  __device__ bool meets(int64_t i) const {
    if (kRowThreads == 1) return true;
    const int lane = threadIdx.x % kRowThreads;
    if (i < head_) return i == lane;
    return i >= tail() ? i - tail() == lane : (i - head_) / kSize % kRowThreads == lane;
  }

 private:
  // Each thread meets the same elements in the same order in each walk. Loads come before the work on what they bring.
  template <class Load, class Vector, class Scalar>
  __device__ void walk(const Load& load, const Vector& vector, const Scalar& scalar) const {
    if constexpr (kRowThreads == 1) {
      for (int64_t i = 0; i < n_; ++i) scalar(i, x_[i * stride_]);
    } else {
      const int lane = threadIdx.x % kRowThreads;
      const int64_t tail = this->tail();
      union {
        uint4 raw;
        Vec<T> elements;
      } u[kLoads];
      if (lane < head_) scalar(lane, x_[lane]);
      int v = lane;
      for (; v < vectors_ - (kLoads - 1) * kRowThreads; v += kLoads * kRowThreads) {
#pragma unroll
        for (int j = 0; j < kLoads; ++j) u[j].raw = load(v + j * kRowThreads, at(v + j * kRowThreads));
#pragma unroll
        for (int j = 0; j < kLoads; ++j) vector(v + j * kRowThreads, u[j].raw, u[j].elements);
      }
      for (; v < vectors_; v += kRowThreads) {
        u[0].raw = load(v, at(v));
        vector(v, u[0].raw, u[0].elements);
      }
      if (tail + lane < n_) scalar(tail + lane, x_[tail + lane]);
    }
  }
  __device__ const T* at(int v) const { return x_ + head_ + int64_t(v) * kSize; }
  __device__ int64_t tail() const { return head_ + int64_t(vectors_) * kSize; }

  const T* x_;
  int64_t n_, stride_, head_;
  int vectors_;
  uint4* kept_;
  int kept_vectors_;
};

}  // namespace tse
