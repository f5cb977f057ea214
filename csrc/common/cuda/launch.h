// The world that a kernel runs in: nvcc's, or the test suite's executor on the host. [CUDA]
// The one place with <<<>>>; kernels use only what is here, in vec.cuh and in reduce.cuh beside plain CUDA C++.
#pragma once
#include <cstddef>
#include <cstdint>

#ifdef TSE_CUDA_ON_HOST
#include "cuda_on_host.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cassert>
#include <stdexcept>
#include <string>

#define TSE_SHARED(type, name, count) __shared__ type name[count]
#define TSE_DYNAMIC_SHARED(type, name)                        \
  extern __shared__ __align__(16) unsigned char name##_raw[]; \
  type* const name = reinterpret_cast<type*>(name##_raw)

namespace tse {

// A broken promise of the caller's data: stops the kernel, as torch's own device-side assertions do.
__device__ inline void device_assert(bool condition, const char* text) {
  if (!condition) __assert_fail(text, __FILE__, __LINE__, "torch_softmax_ext");
}

// Cached once, not again: a logit is read once and its gradient written once.
__device__ inline uint4 load16(const void* p) { return __ldcs(static_cast<const uint4*>(p)); }
__device__ inline void store16(void* p, uint4 v) { __stcs(static_cast<uint4*>(p), v); }

// 2^x: one instruction, relative error 2^-22; subnormal results are 0.
__device__ inline float fast_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

template <class... Params, class... Args>
void launch(const char* name, void (*kernel)(Params...), int64_t blocks, int threads, size_t shared_bytes,
            cudaStream_t stream, Args... args) {
  // clang-format off: it takes >>> for three tokens
  kernel<<<dim3(static_cast<unsigned>(blocks)), dim3(threads), shared_bytes, stream>>>(args...);
  // clang-format on
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess)
    throw std::runtime_error(std::string("torch_softmax_ext: the launch of ") + name + " with " +
                             std::to_string(blocks) + " blocks of " + std::to_string(threads) + " threads and " +
                             std::to_string(shared_bytes) +
                             " bytes of shared memory failed: " + cudaGetErrorString(error));
}

}  // namespace tse
#endif

namespace tse {

// Kernels stride over the rows, so a grid below the hardware's limit serves any number of rows.
constexpr int64_t kMaxBlocks = 2147483647;

inline int64_t grid_for(int64_t rows, int rows_per_block) {
  const int64_t blocks = (rows + rows_per_block - 1) / rows_per_block;
  return blocks < kMaxBlocks ? blocks : kMaxBlocks;
}

}  // namespace tse
