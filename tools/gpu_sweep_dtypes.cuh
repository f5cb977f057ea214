// Included before each of the library's .cu files: leaves out the kernels for fp64 and fp16, which the sweep does not
// launch and which take most of the time to compile. [CUDA]
#pragma once
#include "common/cuda/vec.cuh"

#ifdef __NVCC__
#pragma nv_diag_suppress 177  // what only the other types call is not used
#endif
#undef TSE_BY_DTYPE
#define TSE_BY_DTYPE(dtype, function, ...)    \
  switch (dtype) {                            \
    case DType::kFloat32:                     \
      return function<float>(__VA_ARGS__);    \
    case DType::kBFloat16:                    \
      return function<BFloat16>(__VA_ARGS__); \
    default:                                  \
      break;                                  \
  }
