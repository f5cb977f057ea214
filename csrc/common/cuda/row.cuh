// A row, as the threads that share it walk over it: by 16 bytes, with an unaligned head and tail. [CUDA]
//
// kRowThreads threads share a row: a block, a warp or a part of one (several rows a block), or one thread where the
// elements of a row are not contiguous but rows are. Each thread meets the same elements in the same order in each
// walk. RegisterRow and KeptRow have the same functions; plan.h says which one a row takes.
#pragma once
#include "common/cuda/plan.h"
#include "common/cuda/vec.cuh"

namespace tse {

constexpr int kSmallBlock = 128;  // threads of a block that holds several rows

template <int kRowThreads>
constexpr int kBlockThreads = kRowThreads > 32 ? kRowThreads : kSmallBlock;
template <int kRowThreads>
constexpr int kRowsPerBlock = kBlockThreads<kRowThreads> / kRowThreads;
// Registers for so many threads of a multiprocessor; arithmetic in double takes twice as many of them, and a row that
// is held there some, too.
template <class T, int kRowThreads, int kVectors = 0>
constexpr int kBlocksAtLeast = kResidentThreads *
                               (std::is_same_v<T, double> || kVectors > 8 ? 2
                                : kVectors > 0                            ? 3
                                                                          : 4) /
                               4 / kBlockThreads<kRowThreads>;

template <int kRowThreads>
__device__ inline int64_t first_row() {
  return int64_t(blockIdx.x) * kRowsPerBlock<kRowThreads> + threadIdx.x / kRowThreads;
}
template <int kRowThreads>
__device__ inline int64_t row_step() {
  return int64_t(gridDim.x) * kRowsPerBlock<kRowThreads>;
}

// Elements before the first 16-byte boundary at or after p.
template <class T>
__device__ inline int64_t unaligned_head(const T* p, int64_t n) {
  const int64_t head = (16 - reinterpret_cast<uintptr_t>(p) % 16) % 16 / sizeof(T);
  return head < n ? head : n;
}

template <class T>
__device__ inline bool is_aligned_like(const T* a, const T* b) {
  return (reinterpret_cast<uintptr_t>(a) ^ reinterpret_cast<uintptr_t>(b)) % 16 == 0;
}

// Where the vectors of a row are, and the elements before and after them.
template <int kRowThreads, class T>
struct RowShape {
  static constexpr int kSize = Vec<T>::kSize;
  int64_t n;
  int head, vectors;

  __device__ RowShape(const T* x, int64_t n)
      : n(n),
        head(kRowThreads == 1 ? 0 : int(unaligned_head(x, n))),
        vectors(kRowThreads == 1 ? 0 : int((n - head) / kSize)) {}

  __device__ static int lane() { return threadIdx.x % kRowThreads; }
  __device__ int64_t first(int v) const { return head + int64_t(v) * kSize; }  // element of vector v

  // Elements of head and tail, by number: -1 after the last. A thread has kLoose of them.
  static constexpr int kLoose = (2 * (kSize - 1) + kRowThreads - 1) / kRowThreads;
  __device__ int64_t loose(int number) const {
    const int64_t i = number < head ? number : number + int64_t(vectors) * kSize;
    return i < n ? i : -1;
  }

  // Whether this thread is the one that meets element i.
  __device__ bool meets(int64_t i) const {
    if (kRowThreads == 1) return true;
    const int64_t of_vectors = i - head;
    if (of_vectors >= 0 && of_vectors < int64_t(vectors) * kSize) return of_vectors / kSize % kRowThreads == lane();
    return (of_vectors < 0 ? i : i - int64_t(vectors) * kSize) % kRowThreads == lane();
  }

  // The vector at element i of another row; alike: it is aligned as this one is.
  __device__ static Vec<T> vector_at(const T* y, bool alike, int64_t i) {
    if (alike) return load_vec(y + i);
    Vec<T> result;
#pragma unroll
    for (int k = 0; k < kSize; ++k) result.v[k] = y[i + k];
    return result;
  }
  __device__ static void put(T* y, bool alike, int64_t i, const Vec<T>& value) {
    if (alike) return store_vec(y + i, value);
#pragma unroll
    for (int k = 0; k < kSize; ++k) y[i + k] = value.v[k];
  }
};

// Calls f(the largest element, NaN aside) of each vector and of head and tail.
template <class Row, class F>
__device__ inline void maxima(const Row& row, const F& f) {
  row.read(true, [&](int64_t, const auto& elements) { f(max_of(elements)); }, [&](int64_t, auto v) { f(to_acc(v)); });
}

// y[i] = f(i, x[i]) of a row with map_vectors.
template <class Row, class T, class F>
__device__ inline void map_row(const Row& row, T* y, int64_t stride, const F& f) {
  row.map_vectors(
      y, stride,
      [&](int64_t i, Vec<T> v) {
#pragma unroll
        for (int k = 0; k < Vec<T>::kSize; ++k) v.v[k] = from_acc<T>(f(i + k, to_acc(v.v[k])));
        return v;
      },
      [&](int64_t i, T v) { return from_acc<T>(f(i, to_acc(v))); });
}

// ---- a row in registers ---------------------------------------------------------------------------------------------

// All loads are issued before the first element is used. A vector takes four registers: left to itself, the compiler
// would keep the elements that one walk has unpacked for the next walk, in up to 32.
template <int kRowThreads, class T, int kVectors>
class RegisterRow : public RowShape<kRowThreads, T> {
  using Shape = RowShape<kRowThreads, T>;
  using Shape::kLoose;

 public:
  static constexpr bool kInRegisters = true;

  __device__ RegisterRow(const T* x, int64_t n, int64_t, uint4* = nullptr, int = 0) : Shape(x, n), x_(x) {}

  __device__ void load() {
#pragma unroll
    for (int j = 0; j < kVectors; ++j)
      if (has(j)) raw_[j] = load16(x_ + this->first(number(j)));
#pragma unroll
    for (int j = 0; j < kLoose; ++j)
      if (const int64_t i = this->loose(number(j)); i >= 0) loose_[j] = x_[i];
  }

  // vector(i, 16 bytes at element i), scalar(i, one element).
  template <class Vector, class Scalar>
  __device__ void read(bool, const Vector& vector, const Scalar& scalar) const {
#pragma unroll
    for (int j = 0; j < kVectors; ++j)
      if (has(j)) vector(this->first(number(j)), bits_as<Vec<T>>(unseen(raw_[j])));
#pragma unroll
    for (int j = 0; j < kLoose; ++j)
      if (const int64_t i = this->loose(number(j)); i >= 0) scalar(i, loose_[j]);
  }

  // y = vector(i, 16 bytes at element i), y[i] = scalar(i, x[i]); y is written by 16 bytes where it is aligned as x is.
  template <class Vector, class Scalar>
  __device__ void map_vectors(T* y, int64_t, const Vector& vector, const Scalar& scalar) const {
    const bool alike = is_aligned_like<T>(x_, y);
    read(
        true, [&](int64_t i, const Vec<T>& elements) { this->put(y, alike, i, vector(i, elements)); },
        [&](int64_t i, T v) { y[i] = scalar(i, v); });
  }

 private:
  __device__ static int number(int j) { return Shape::lane() + j * kRowThreads; }
  __device__ bool has(int j) const { return number(j) < this->vectors; }

  const T* x_;
  uint4 raw_[kVectors];
  T loose_[kLoose];
};

// ---- a row in shared memory, as far as it fits
// ------------------------------------------------------------------------

// The first `kept_vectors` vectors stay in shared memory, where each thread finds again what it wrote, so no barrier is
// needed; the others are read from memory again, from L2 as far as it reaches: so the second walk goes through them
// first, and backwards. With one thread per row nothing is kept. kLoads: 16-byte loads of a thread that are under way
// together; four are 64 KiB for a multiprocessor of 1024 threads.
template <int kRowThreads, class T, int kLoads = 4>
class KeptRow : public RowShape<kRowThreads, T> {
  using Shape = RowShape<kRowThreads, T>;

 public:
  static constexpr bool kInRegisters = false;

  __device__ KeptRow(const T* x, int64_t n, int64_t stride, uint4* kept = nullptr, int kept_vectors = 0)
      : Shape(x, n), x_(x), stride_(stride), kept_(kept), kept_vectors_(kept_vectors) {}

  __device__ void load() {}

  // The first walk: vector(i, 16 bytes at element i), scalar(i, one element). `again`: a second one will come.
  template <class Vector, class Scalar>
  __device__ void read(bool again, const Vector& vector, const Scalar& scalar) const {
    const auto load = [&](int v) { return again && v >= kept_vectors_ ? load16_again(at(v)) : load16(at(v)); };
    walk_vectors<false>(0, this->vectors, load, [&](int v, uint4 raw) {
      if (v < kept_vectors_) kept_[v] = raw;
      vector(this->first(v), bits_as<Vec<T>>(raw));
    });
    walk_others(scalar);
  }

  // The last walk, as RegisterRow's. y may be x.
  template <class Vector, class Scalar>
  __device__ void map_vectors(T* y, int64_t y_stride, const Vector& vector, const Scalar& scalar) const {
    const bool alike = is_aligned_like<T>(x_, y);
    const auto put = [&](int v, uint4 raw) {
      this->put(y, alike, this->first(v), vector(this->first(v), bits_as<Vec<T>>(raw)));
    };
    const int kept = kept_vectors_ < this->vectors ? kept_vectors_ : this->vectors;
    walk_vectors<true>(kept, this->vectors, [&](int v) { return load16(at(v)); }, put);
    walk_vectors<false>(0, kept, [&](int v) { return kept_[v]; }, put);
    walk_others([&](int64_t i, T v) { y[i * y_stride] = scalar(i, v); });
  }

 private:
  __device__ const T* at(int v) const { return x_ + this->first(v); }

  // This thread's vectors of [begin, end). Loads come before the work on what they bring.
  template <bool kBackwards, class Load, class Vector>
  __device__ void walk_vectors(int begin, int end, const Load& load, const Vector& vector) const {
    uint4 raw[kLoads];
    const int first = begin + (Shape::lane() + kRowThreads - begin % kRowThreads) % kRowThreads;
    const int count = first < end ? (end - first - 1) / kRowThreads + 1 : 0;
    const int step = kBackwards ? -kRowThreads : kRowThreads;
    int v = kBackwards ? first + (count - 1) * kRowThreads : first, left = count;
    for (; left >= kLoads; left -= kLoads, v += kLoads * step) {
#pragma unroll
      for (int j = 0; j < kLoads; ++j) raw[j] = load(v + j * step);
#pragma unroll
      for (int j = 0; j < kLoads; ++j) vector(v + j * step, raw[j]);
    }
    for (; left > 0; --left, v += step) vector(v, load(v));
  }

  // Elements of head and tail; of a row of one thread all.
  template <class Scalar>
  __device__ void walk_others(const Scalar& scalar) const {
    if constexpr (kRowThreads == 1) {
      constexpr int kGroup = kLoads;  // loads issued together
      int64_t i = 0;
      for (; i + kGroup <= this->n; i += kGroup) {
        T group[kGroup];
#pragma unroll
        for (int k = 0; k < kGroup; ++k) group[k] = x_[(i + k) * stride_];
#pragma unroll
        for (int k = 0; k < kGroup; ++k) scalar(i + k, group[k]);
      }
      for (; i < this->n; ++i) scalar(i, x_[i * stride_]);
    } else {
      for (int number = Shape::lane(); number < 2 * (Shape::kSize - 1); number += kRowThreads)
        if (const int64_t i = this->loose(number); i >= 0) scalar(i, x_[i]);
    }
  }

  const T* x_;
  int64_t stride_;
  uint4* kept_;
  int kept_vectors_;
};

template <class T, int kRowThreads, int kVectors, int kLoads = 4>
using Row = std::conditional_t<kVectors == 0, KeptRow<kRowThreads, T, kLoads>, RegisterRow<kRowThreads, T, kVectors>>;

template <int kRowThreads, class T>
__device__ inline void zero_row(T* y, int64_t stride, int64_t n) {
  const T zero = from_acc<T>(0);
  const int lane = threadIdx.x % kRowThreads;
  if (kRowThreads == 1 || stride != 1) {
    for (int64_t i = lane; i < n; i += kRowThreads) y[i * stride] = zero;
    return;
  }
  const RowShape<kRowThreads, T> shape(y, n);
  for (int v = lane; v < shape.vectors; v += kRowThreads) store16(y + shape.first(v), uint4{0, 0, 0, 0});
  for (int number = lane; number < 2 * (shape.kSize - 1); number += kRowThreads)
    if (const int64_t i = shape.loose(number); i >= 0) y[i] = zero;
}

// ---- launching
// --------------------------------------------------------------------------------------------------------

template <int kThreads_, int kVectors_>
struct PlanOf {
  static constexpr int kThreads = kThreads_, kVectors = kVectors_;
};

// Calls f(PlanOf<threads, vectors>) for the plan of rows of n elements of T. kKeeps: in shared memory.
template <class T, bool kRegisters, bool kKeeps = true, class F>
void with_plan(int64_t n, bool contiguous, const F& f) {
  const RowPlan plan = plan_row(device_limits(), n, sizeof(T), contiguous, kRegisters, kKeeps);
  const auto is = [&](int threads, int vectors) { return plan.threads == threads && plan.vectors == vectors; };
  if constexpr (kRegisters && !std::is_same_v<T, double>) {
    if (is(4, 2)) return f(PlanOf<4, 2>());
    if (is(8, 4)) return f(PlanOf<8, 4>());
    if (is(32, 4)) return f(PlanOf<32, 4>());
    if (is(32, 16)) return f(PlanOf<32, 16>());
    if (is(128, 16)) return f(PlanOf<128, 16>());
  } else {
    if (is(32, 0)) return f(PlanOf<32, 0>());
    if (is(128, 0)) return f(PlanOf<128, 0>());
  }
  if constexpr (kKeeps && !std::is_same_v<T, double>)
    if (is(1024, 0)) return f(PlanOf<1024, 0>());
  if (is(512, 0)) return f(PlanOf<512, 0>());
  f(PlanOf<1, 0>());
}

}  // namespace tse
