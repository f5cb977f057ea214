// The rows of a map, as its kernel sees them: as they are stored, or prepared. [CUDA]
//
// Prepared rows are scaled by a temperature, masked, or of other types than the arithmetic. Their elements become
// numbers of the arithmetic's type A on the way into registers or shared memory, so that memory is passed once in each
// direction. What is left of a temperature is the slope of the exponents: dividing first would overflow, and would cost
// a rounding.
#pragma once
#include "common/cuda/logits.cuh"
#include "common/cuda/row.cuh"
#include "common/row_params.h"

namespace tse {

template <class T_>
struct StoredRows {
  using T = T_;
  using A = Acc<T>;
  using Elements = Stored<T>;
  static constexpr bool kHasSlope = false;
  RowMapParams p;

  TSE_HOST_DEVICE const RowMapParams& map() const { return p; }
  __device__ Elements elements(int64_t row) const {
    return {static_cast<const T*>(p.input) + row_offset(p.rows, row), p.rows.stride_n};
  }
  __device__ StoredOutput<T> output(int64_t row, const Elements& x) const {
    return {static_cast<T*>(p.output) + row_offset(p.output_rows, row), p.output_rows.stride_n, x.x};
  }
};

// ---- elements of any type ------------------------------------------------------------------------------------------

// Calls f(T()) for the storage type; double only where A is double.
template <class A, class F>
__device__ inline void with_type(DType dtype, const F& f) {
  switch (dtype) {
    case DType::kFloat64:
      if constexpr (std::is_same_v<A, double>) f(double());
      return;
    case DType::kFloat32:
      return f(float());
    case DType::kFloat16:
      return f(Half());
    case DType::kBFloat16:
      return f(BFloat16());
  }
}
__device__ inline int element_bytes(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

// As many elements of T as a vector of A has, in one access.
template <class T, class A>
struct alignas(sizeof(T) * Vec<A>::kSize) Pack {
  T v[Vec<A>::kSize];
};

template <class A>
struct PreparedElements {
  static constexpr int kSize = Vec<A>::kSize;
  const char* x;
  int64_t stride;
  DType dtype;
  A scale;
  // nullptr: none. Boolean, else added times mask_scale.
  const char* mask;
  int64_t mask_stride;
  bool mask_is_bool;
  A mask_scale;

  __device__ int head(int64_t n) const {
    const int bytes = element_bytes(dtype), of_pack = bytes * kSize;
    const int64_t head = (of_pack - reinterpret_cast<uintptr_t>(x) % of_pack) % of_pack / bytes;
    return int(head < n ? head : n);
  }
  __device__ A operator[](int64_t i) const {
    A v = 0;
    with_type<A>(dtype, [&](auto type) { v = A(to_acc(reinterpret_cast<const decltype(type)*>(x)[i * stride])); });
    return masked(i, v);
  }
  template <int kCount, class Has, class At, class Again = Never>
  __device__ void load(uint4 (&raw)[kCount], const Has& has, const At& at, const Again& = {}) const {
    with_type<A>(dtype, [&](auto type) {
      using T = decltype(type);
#pragma unroll
      for (int j = 0; j < kCount; ++j) {
        if (!has(j)) continue;
        const auto pack = *reinterpret_cast<const Pack<T, A>*>(x + at(j) * sizeof(T));
        Vec<A> v;
#pragma unroll
        for (int k = 0; k < kSize; ++k) v.v[k] = A(to_acc(pack.v[k]));
        raw[j] = bits_as<uint4>(v);
      }
    });
    if (mask == nullptr) return;
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      if (!has(j)) continue;
      Vec<A> v = bits_as<Vec<A>>(raw[j]);
#pragma unroll
      for (int k = 0; k < kSize; ++k) v.v[k] = masked(at(j) + k, v.v[k]);
      raw[j] = bits_as<uint4>(v);
    }
  }

 private:
  __device__ A masked(int64_t i, A v) const {
    if (mask == nullptr) return v;
    if (mask_is_bool) return mask[i * mask_stride] != 0 ? v : -infinity<A>();
    return v * scale + reinterpret_cast<const A*>(mask)[i * mask_stride] * mask_scale;
  }
};

template <class A>
struct PreparedOutput {
  char* y;
  int64_t stride;
  DType dtype;
  bool aligned;

  __device__ void set(int64_t i, A value) const {
    with_type<A>(dtype, [&](auto type) {
      using T = decltype(type);
      reinterpret_cast<T*>(y)[i * stride] = from_acc<T>(Acc<T>(value));
    });
  }
  __device__ void put(int64_t i, const Vec<A>& value) const {
    with_type<A>(dtype, [&](auto type) {
      using T = decltype(type);
      Pack<T, A> pack;
#pragma unroll
      for (int k = 0; k < Vec<A>::kSize; ++k) pack.v[k] = from_acc<T>(Acc<T>(value.v[k]));
      T* const to = reinterpret_cast<T*>(y) + i;
      if (aligned) {
        *reinterpret_cast<Pack<T, A>*>(to) = pack;
      } else {
#pragma unroll
        for (int k = 0; k < Vec<A>::kSize; ++k) to[k] = pack.v[k];
      }
    });
  }
};

template <class A_>
struct PreparedRows {
  using T = A_;
  using A = A_;
  using Elements = PreparedElements<A>;
  static constexpr bool kHasSlope = true;
  PreparedRowsParams p;

  TSE_HOST_DEVICE const RowMapParams& map() const { return p.map; }
  // What elements and mask are multiplied by before they are added, and what is then left to divide their sum by. None
  // of it makes an infinity of a finite number, and of logits only a power of two is taken, which is exact.
  struct Units {
    double of_logits, of_mask, temperature;
  };
  __device__ Units units(int64_t row) const {
    const double t = temperature_within<A>(p.temperature(row));
    if (p.mask == nullptr || p.mask_is_bool) return {1, 1, t};
    if (!(t > 1)) return {1, t, t};
    int power = 0;
    const double rest = frexp(t, &power);  // t = rest · 2^power
    return {ldexp(1.0, -power), rest, rest};
  }
  __device__ double temperature(int64_t row) const { return units(row).temperature; }
  __device__ Elements elements(int64_t row) const {
    const Units u = units(row);
    const char* const x = static_cast<const char*>(p.map.input);
    Elements e = {x + row_offset(p.map.rows, row) * element_bytes(p.input_dtype),
                  p.map.rows.stride_n,
                  p.input_dtype,
                  A(u.of_logits),
                  nullptr,
                  p.mask_stride_n,
                  p.mask_is_bool,
                  A(u.of_mask)};
    if (p.mask != nullptr)
      e.mask = static_cast<const char*>(p.mask) + p.mask_at.offset(row) * (p.mask_is_bool ? 1 : int(sizeof(A)));
    return e;
  }
  __device__ PreparedOutput<A> output(int64_t row, const Elements& x) const {
    const int bytes = element_bytes(p.output_dtype);
    char* const y = static_cast<char*>(p.map.output) + row_offset(p.map.output_rows, row) * bytes;
    const uintptr_t first = reinterpret_cast<uintptr_t>(y) + x.head(p.map.rows.n) * bytes;
    return {y, p.map.output_rows.stride_n, p.output_dtype, first % (bytes * Vec<A>::kSize) == 0};
  }
};

// ---- launching -----------------------------------------------------------------------------------------------------

// Calls f(plan) for the plan of the rows of a forward, if there are any. Without registers for rows, whose arithmetic
// takes them all, a block has no more than 512 threads.
template <bool kRegisters = true, class Rows, class F>
void with_plan_of_rows(const Rows& rows, const F& f) {
  const RowMapParams& p = rows.map();
  if (row_count(p.rows) == 0) return;
  with_plan<typename Rows::T, kRegisters, kRegisters>(p.rows.n, p.rows.stride_n == 1 && p.output_rows.stride_n == 1, f);
}

// Calls f(rows) for prepared rows, by the type of the arithmetic.
template <class F>
void with_prepared_rows(const PreparedRowsParams& p, const F& f) {
  p.map.dtype == DType::kFloat64 ? f(PreparedRows<double>{p}) : f(PreparedRows<float>{p});
}

}  // namespace tse
