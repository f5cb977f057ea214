// A row, as the threads that share it walk over it: by 16 bytes, with an unaligned head and tail. [CUDA]
//
// kRowThreads threads share a row: a block, a warp or a part of one (several rows a block), or one thread where the
// elements of a row are not contiguous but rows are. Each thread meets the same elements in the same order in each
// walk. RegisterRow and KeptRow have the same functions; plan.h says which one a row takes. Where elements come from
// and where results go is up to Stored and StoredOutput, or to what has their functions (map_rows.cuh).
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

struct Always {
  __device__ constexpr bool operator()(int) const { return true; }
};
struct Never {
  __device__ constexpr bool operator()(int) const { return false; }
};

// The elements of a row, as they are in memory.
template <class T>
struct Stored {
  const T* x;
  int64_t stride;

  __device__ int head(int64_t n) const { return int(unaligned_head(x, n)); }  // elements before the first vector
  __device__ T operator[](int64_t i) const { return x[i * stride]; }
  // Loads vectors number j, from element at(j) on, if has(j). again(j): it will be read again.
  template <int kCount, class Has, class At, class Again = Never>
  __device__ void load(uint4 (&raw)[kCount], const Has& has, const At& at, const Again& again = {}) const {
#pragma unroll
    for (int j = 0; j < kCount; ++j)
      if (has(j)) raw[j] = again(j) ? load16_again(x + at(j)) : load16(x + at(j));
  }
};

// Where the results of a row go; alike: by 16 bytes, as the row is aligned as its elements are.
template <class T>
struct StoredOutput {
  T* y;
  int64_t stride;
  bool alike;

  __device__ StoredOutput(T* y, int64_t stride, const T* x) : y(y), stride(stride), alike(is_aligned_like<T>(x, y)) {}
  __device__ void set(int64_t i, T value) const { y[i * stride] = value; }
  __device__ void put(int64_t i, const Vec<T>& value) const {
    if (alike) return store_vec(y + i, value);
#pragma unroll
    for (int k = 0; k < Vec<T>::kSize; ++k) y[i + k] = value.v[k];
  }
};

// Where the vectors of a row are, and the elements before and after them.
template <int kRowThreads, class T>
struct RowShape {
  static constexpr int kSize = Vec<T>::kSize;
  int64_t n;
  int head, vectors;

  template <class Elements>
  __device__ RowShape(const Elements& x, int64_t n)
      : n(n), head(kRowThreads == 1 ? 0 : x.head(n)), vectors(kRowThreads == 1 ? 0 : int((n - head) / kSize)) {}

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
};

// Calls f(the largest element, NaN aside) of each vector and of head and tail.
template <class Row, class F>
__device__ inline void maxima(const Row& row, const F& f) {
  row.read(true, [&](int64_t, const auto& elements) { f(max_of(elements)); }, [&](int64_t, auto v) { f(to_acc(v)); });
}

// y[i] = f(i, x[i]) of a row with map_vectors, into a StoredOutput or the like.
template <class T, class Row, class Output, class F>
__device__ inline void map_row(const Row& row, const Output& y, const F& f) {
  row.map_vectors(
      y,
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
template <int kRowThreads, class T, int kVectors, class Elements = Stored<T>>
class RegisterRow : public RowShape<kRowThreads, T> {
  using Shape = RowShape<kRowThreads, T>;
  using Shape::kLoose;

 public:
  static constexpr bool kInRegisters = true;

  __device__ RegisterRow(const Elements& x, int64_t n, uint4* = nullptr, int = 0) : Shape(x, n), x_(x) {}

  __device__ void load() {
    x_.load(raw_, [&](int j) { return has(j); }, [&](int j) { return this->first(number(j)); });
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
  template <class Vector, class Scalar>
  __device__ void read_again(const Vector& vector, const Scalar& scalar) const {
    read(true, vector, scalar);
  }

  // y = vector(i, 16 bytes at element i), y[i] = scalar(i, x[i]).
  template <class Output, class Vector, class Scalar>
  __device__ void map_vectors(const Output& y, const Vector& vector, const Scalar& scalar) const {
    read(
        true, [&](int64_t i, const Vec<T>& elements) { y.put(i, vector(i, elements)); },
        [&](int64_t i, T v) { y.set(i, scalar(i, v)); });
  }

 private:
  __device__ static int number(int j) { return Shape::lane() + j * kRowThreads; }
  __device__ bool has(int j) const { return number(j) < this->vectors; }

  Elements x_;
  uint4 raw_[kVectors];
  T loose_[kLoose];
};

// ---- a row in shared memory, as far as it fits ----------------------------------------------------------------------

// The first `kept_vectors` vectors stay in shared memory, where each thread finds again what it wrote, so no barrier is
// needed; the others are read from memory again, from L2 as far as it reaches: so the second walk goes through them
// first, and backwards. With one thread per row nothing is kept. kLoads: 16-byte loads of a thread that are under way
// together; four are 64 KiB for a multiprocessor of 1024 threads.
template <int kRowThreads, class T, int kLoads = 4, class Elements = Stored<T>>
class KeptRow : public RowShape<kRowThreads, T> {
  using Shape = RowShape<kRowThreads, T>;

 public:
  static constexpr bool kInRegisters = false;

  __device__ KeptRow(const Elements& x, int64_t n, uint4* kept = nullptr, int kept_vectors = 0)
      : Shape(x, n), x_(x), kept_(kept), kept_vectors_(kept_vectors) {}

  __device__ void load() {}

  // The first walk: vector(i, 16 bytes at element i), scalar(i, one element). `again`: others will come.
  template <class Vector, class Scalar>
  __device__ void read(bool again, const Vector& vector, const Scalar& scalar) const {
    const auto put = [&](int v, uint4 raw) {
      if (v < kept_vectors_) kept_[v] = raw;
      vector(this->first(v), bits_as<Vec<T>>(raw));
    };
    walk_vectors<false>(0, this->vectors, loader(again), put);
    walk_others(scalar);
  }
  // A walk after that.
  template <class Vector, class Scalar>
  __device__ void read_again(const Vector& vector, const Scalar& scalar) const {
    walk_again(true, [&](int v, uint4 raw) { vector(this->first(v), bits_as<Vec<T>>(raw)); });
    walk_others(scalar);
  }

  // The last walk, as RegisterRow's. The row may be written over.
  template <class Output, class Vector, class Scalar>
  __device__ void map_vectors(const Output& y, const Vector& vector, const Scalar& scalar) const {
    walk_again(false, [&](int v, uint4 raw) { y.put(this->first(v), vector(this->first(v), bits_as<Vec<T>>(raw))); });
    walk_others([&](int64_t i, T v) { y.set(i, scalar(i, v)); });
  }

 private:
  // load(raw, at): reads vectors number at(j); a function for walk_vectors.
  __device__ auto loader(bool again) const {
    return [this, again](auto& raw, const auto& at) {
      const auto first = [&](int j) { return this->first(at(j)); };
      if (again) x_.load(raw, Always(), first, [&](int j) { return at(j) >= kept_vectors_; });
      else x_.load(raw, Always(), first);
    };
  }

  template <class F>
  __device__ void walk_again(bool again, const F& f) const {
    const int kept = kept_vectors_ < this->vectors ? kept_vectors_ : this->vectors;
    walk_vectors<true>(kept, this->vectors, loader(again), f);
    const auto from_kept = [&](auto& raw, const auto& at) {
#pragma unroll
      for (int j = 0; j < int(sizeof(raw) / sizeof(raw[0])); ++j) raw[j] = kept_[at(j)];
    };
    walk_vectors<false>(0, kept, from_kept, f);
  }

  // This thread's vectors of [begin, end). Loads come before the work on what they bring.
  template <bool kBackwards, class Load, class Vector>
  __device__ void walk_vectors(int begin, int end, const Load& load, const Vector& vector) const {
    const int first = begin + (Shape::lane() + kRowThreads - begin % kRowThreads) % kRowThreads;
    const int count = first < end ? (end - first - 1) / kRowThreads + 1 : 0;
    const int step = kBackwards ? -kRowThreads : kRowThreads;
    int v = kBackwards ? first + (count - 1) * kRowThreads : first, left = count;
    for (; left >= kLoads; left -= kLoads, v += kLoads * step) {
      uint4 raw[kLoads];
      load(raw, [&](int j) { return v + j * step; });
#pragma unroll
      for (int j = 0; j < kLoads; ++j) vector(v + j * step, raw[j]);
    }
    for (; left > 0; --left, v += step) {
      uint4 raw[1];
      load(raw, [&](int) { return v; });
      vector(v, raw[0]);
    }
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
        for (int k = 0; k < kGroup; ++k) group[k] = x_[i + k];
#pragma unroll
        for (int k = 0; k < kGroup; ++k) scalar(i + k, group[k]);
      }
      for (; i < this->n; ++i) scalar(i, x_[i]);
    } else {
      for (int number = Shape::lane(); number < 2 * (Shape::kSize - 1); number += kRowThreads)
        if (const int64_t i = this->loose(number); i >= 0) scalar(i, x_[i]);
    }
  }

  Elements x_;
  uint4* kept_;
  int kept_vectors_;
};

template <class T, int kRowThreads, int kVectors, int kLoads = 4, class Elements = Stored<T>>
using Row = std::conditional_t<kVectors == 0, KeptRow<kRowThreads, T, kLoads, Elements>,
                               RegisterRow<kRowThreads, T, kVectors, Elements>>;

template <int kRowThreads, class T>
__device__ inline void zero_row(T* y, int64_t stride, int64_t n) {
  const T zero = from_acc<T>(0);
  const int lane = threadIdx.x % kRowThreads;
  if (kRowThreads == 1 || stride != 1) {
    for (int64_t i = lane; i < n; i += kRowThreads) y[i * stride] = zero;
    return;
  }
  const RowShape<kRowThreads, T> shape(Stored<T>{y, 1}, n);
  for (int v = lane; v < shape.vectors; v += kRowThreads) store16(y + shape.first(v), uint4{0, 0, 0, 0});
  for (int number = lane; number < 2 * (shape.kSize - 1); number += kRowThreads)
    if (const int64_t i = shape.loose(number); i >= 0) y[i] = zero;
}

// ---- launching ------------------------------------------------------------------------------------------------------

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

// Launches kernel(args…, vectors of each row that its block keeps) for rows of n elements of T.
template <class Plan, class T, class... Params, class... Args>
void launch_rows(const char* name, void (*kernel)(Params...), int64_t rows, int64_t n, cudaStream_t stream,
                 const Args&... args) {
  constexpr int kThreads = kBlockThreads<Plan::kThreads>, kRows = kRowsPerBlock<Plan::kThreads>;
  const bool keeps = Plan::kThreads > 1 && Plan::kVectors == 0;
  const int kept = keeps ? kept_vectors(device_limits(), n * sizeof(T) / 16, kRows) : 0;
  const size_t shared = size_t(kept) * 16 * kRows;
  launch(name, kernel, grid_for(rows, kRows, kernel, kThreads, shared), kThreads, shared, stream, args..., kept);
}

}  // namespace tse
