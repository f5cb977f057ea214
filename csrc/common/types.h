// Plain descriptions that cross from the torch side to the kernels. [plain]
#pragma once
#include <cstdint>

struct CUstream_st;  // what cudaStream_t points to: launchers are declared without a CUDA header
typedef CUstream_st* cudaStream_t;

// Declares what the .cu files define: null in a build without them.
#define TSE_CUDA __attribute__((weak))

namespace tse {

enum class DType : int32_t { kFloat32, kFloat64, kFloat16, kBFloat16 };

// return function<T>(…) for the storage type of `dtype`, by the names that CPU rows and CUDA kernels have for it.
#define TSE_BY_DTYPE(dtype, function, ...)    \
  switch (dtype) {                            \
    case DType::kFloat32:                     \
      return function<float>(__VA_ARGS__);    \
    case DType::kFloat64:                     \
      return function<double>(__VA_ARGS__);   \
    case DType::kFloat16:                     \
      return function<Half>(__VA_ARGS__);     \
    case DType::kBFloat16:                    \
      return function<BFloat16>(__VA_ARGS__); \
  }

enum class Reduction : int32_t { kNone, kMean, kSum };  // the codes of at::Reduction

// A tensor seen as `outer × n × inner`: one row is the n elements along the operator's dimension, and row r lies at
// outer index r / inner and inner index r % inner. Strides are in elements. Where no dimension follows,
// the dimensions before it are `inner` and outer is 1. Tensors of one shape have the same outer, n and inner.
struct Rows {
  int64_t outer = 0, n = 0, inner = 0;
  int64_t stride_outer = 0, stride_n = 0, stride_inner = 0;
};

#if defined(__CUDACC__)
#define TSE_HOST_DEVICE __host__ __device__
#else
#define TSE_HOST_DEVICE
#endif

// Whether one stride leads from each row to the next.
inline bool has_one_stride(const Rows& rows) {
  return rows.outer == 1 || rows.stride_outer == rows.inner * rows.stride_inner;
}

// Calls part(f, begin, end) for parts of [0, blocks), on several threads that share a row; a block is `size` elements.
typedef void ShareRow(int64_t blocks, int64_t size, void (*part)(const void* f, int64_t begin, int64_t end),
                      const void* f);

// Offset in elements of row r's first element.
TSE_HOST_DEVICE inline int64_t row_offset(const Rows& rows, int64_t r) {
  if (rows.outer == 1) return r * rows.stride_inner;
  return r / rows.inner * rows.stride_outer + r % rows.inner * rows.stride_inner;
}

TSE_HOST_DEVICE inline int64_t row_count(const Rows& rows) { return rows.outer * rows.inner; }

// The class of a row in the params of a loss; -1 where targets are probabilities.
template <class Params>
TSE_HOST_DEVICE inline int64_t target_of(const Params& p, int64_t row) {
  if (p.target == nullptr) return -1;
  return p.target_is_int32 ? static_cast<const int32_t*>(p.target)[row] : static_cast<const int64_t*>(p.target)[row];
}
// Probabilities always count.
template <class Params>
TSE_HOST_DEVICE inline bool is_counted(const Params& p, int64_t target) {
  return p.target == nullptr || target != p.ignore_index;
}

// Where row r finds what is its own in a tensor that is broadcast over the rows: the rows as a grid of few dimensions,
// with a stride of 0 along those that are broadcast.
constexpr int kMaxRowDims = 6;
struct RowIndex {
  int dims = 0;
  int64_t size[kMaxRowDims] = {}, stride[kMaxRowDims] = {};

  TSE_HOST_DEVICE int64_t offset(int64_t r) const {
    int64_t sum = 0;
    for (int d = dims - 1; d > 0; --d) {
      sum += r % size[d] * stride[d];
      r /= size[d];
    }
    return dims == 0 ? 0 : sum + r * stride[0];
  }
};

}  // namespace tse
