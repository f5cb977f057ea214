// The world that a kernel runs in: nvcc's, or the test suite's executor on the host. [CUDA]
// The one place with <<<>>>; kernels use only what is here, in vec.cuh and in reduce.cuh beside plain CUDA C++.
#pragma once
#include <cstddef>
#include <cstdint>

#include "common/cuda/plan.h"

#ifdef TSE_CUDA_ON_HOST
#include "cuda_on_host.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cassert>
#include <mutex>
#include <stdexcept>
#include <string>
#include <tuple>

#define TSE_NOINLINE __noinline__
#define TSE_SHARED(type, name, count) __shared__ type name[count]
#define TSE_DEVICE_ARRAY(type, name, count) __device__ type name[count]
#define TSE_DYNAMIC_SHARED(type, name)                        \
  extern __shared__ __align__(16) unsigned char name##_raw[]; \
  type* const name = reinterpret_cast<type*>(name##_raw)

namespace tse {

// A broken promise of the caller's data: stops the kernel, as torch's own device-side assertions do.
__device__ inline void device_assert(bool condition, const char* text) {
  if (condition) return;
  __assert_fail(text, __FILE__, __LINE__, "torch_softmax_ext");
  __builtin_unreachable();
}

// Cached once, not again: a logit is read once and its gradient written once. load16_again: it will be read again.
__device__ inline uint4 load16(const void* p) { return __ldcs(static_cast<const uint4*>(p)); }
__device__ inline uint4 load16_again(const void* p) { return *static_cast<const uint4*>(p); }
__device__ inline void store16(void* p, uint4 v) { __stcs(static_cast<uint4*>(p), v); }

// v, of which the compiler keeps nothing that it has computed before.
__device__ inline uint4 unseen(uint4 v) {
  asm volatile("" : "+r"(v.x), "+r"(v.y), "+r"(v.z), "+r"(v.w));
  return v;
}

// 2^x: one instruction, relative error 2^-22; subnormal results are 0.
__device__ inline float fast_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Relative error 2^-23; subnormal x are 0.
__device__ inline float fast_sqrt(float x) {
  float y;
  asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ inline double fast_sqrt(double x) { return sqrt(x); }

// Of each of two elements the larger, or the one that is not NaN.
__device__ inline __half2 max_of_pairs(__half2 a, __half2 b) { return __hmax2(a, b); }
__device__ inline __nv_bfloat162 max_of_pairs(__nv_bfloat162 a, __nv_bfloat162 b) { return __hmax2(a, b); }

inline void check_cuda(cudaError_t error, const std::string& what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // so that nobody else finds it
  throw std::runtime_error("torch_softmax_ext: " + what + " failed: " + cudaGetErrorString(error));
}

// Of the current device; asked for once.
inline const DeviceLimits& device_limits() {
  constexpr int kDevices = 64;
  static DeviceLimits limits[kDevices];
  static std::once_flag asked[kDevices];
  int device = 0;
  check_cuda(cudaGetDevice(&device), "cudaGetDevice");
  if (device >= kDevices) throw std::runtime_error("torch_softmax_ext: more than 64 devices");
  std::call_once(asked[device], [device] {
    const auto attribute = [device](cudaDeviceAttr which) {
      int value = 0;
      check_cuda(cudaDeviceGetAttribute(&value, which, device), "cudaDeviceGetAttribute");
      return value;
    };
    limits[device] = {attribute(cudaDevAttrMultiProcessorCount), attribute(cudaDevAttrMaxThreadsPerMultiProcessor),
                      attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin),
                      attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor)};
  });
  return limits[device];
}

// Launches of equal orders never run beside each other.
struct LaunchOrder {
  int device;
  const void* stream;
  unsigned long long capture;  // 0: none
  bool operator<(const LaunchOrder& o) const {
    return std::tie(device, stream, capture) < std::tie(o.device, o.stream, o.capture);
  }
};
inline LaunchOrder launch_order(cudaStream_t stream) {
  LaunchOrder order = {0, stream, 0};
  check_cuda(cudaGetDevice(&order.device), "cudaGetDevice");
  cudaStreamCaptureStatus status;
  unsigned long long id = 0;
  check_cuda(cudaStreamGetCaptureInfo(stream, &status, &id), "cudaStreamGetCaptureInfo");
  if (status == cudaStreamCaptureStatusActive) order.capture = id + 1;
  return order;
}

// Of a TSE_DEVICE_ARRAY on the current device.
template <class V, size_t kCount>
V* device_address(V (&array)[kCount]) {
  void* address = nullptr;
  check_cuda(cudaGetSymbolAddress(&address, array), "cudaGetSymbolAddress");
  return static_cast<V*>(address);
}

inline void zero_memory(void* p, size_t bytes, cudaStream_t stream) {
  check_cuda(cudaMemsetAsync(p, 0, bytes, stream), "cudaMemsetAsync");
}

// More than 48 KiB of dynamic shared memory must be asked for: always for as much as any launch may want, since two
// threads may launch one kernel with different sizes.
template <class... Params>
void allow_shared(void (*kernel)(Params...), size_t bytes) {
  if (bytes <= 48 * 1024) return;
  const int64_t most = std::max<int64_t>(shared_for_rows(device_limits(), 1), static_cast<int64_t>(bytes));
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(most)),
             "asking for " + std::to_string(most) + " bytes of shared memory");
}

// Blocks that run at a time: beyond them, a grid only takes longer to start.
template <class... Params>
int64_t running_blocks(void (*kernel)(Params...), int threads, size_t shared_bytes) {
  int blocks = 0;
  allow_shared(kernel, shared_bytes);
  check_cuda(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, shared_bytes),
             "cudaOccupancyMaxActiveBlocksPerMultiprocessor");
  return int64_t(blocks < 1 ? 1 : blocks) * device_limits().multiprocessors;
}

template <class... Params, class... Args>
void launch(const char* name, void (*kernel)(Params...), int64_t blocks, int threads, size_t shared_bytes,
            cudaStream_t stream, Args... args) {
  allow_shared(kernel, shared_bytes);
  // clang-format off: it takes >>> for three tokens
  kernel<<<dim3(static_cast<unsigned>(blocks)), dim3(threads), shared_bytes, stream>>>(args...);
  // clang-format on
  check_cuda(cudaGetLastError(), std::string("the launch of ") + name + " with " + std::to_string(blocks) +
                                     " blocks of " + std::to_string(threads) + " threads and " +
                                     std::to_string(shared_bytes) + " bytes of shared memory");
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

// No more blocks than run at a time. Few need not be counted, which takes the host a while.
template <class... Params>
int64_t grid_for(int64_t rows, int rows_per_block, void (*kernel)(Params...), int threads, size_t shared_bytes) {
  const int64_t blocks = grid_for(rows, rows_per_block);
  if (blocks <= device_limits().multiprocessors) return blocks;
  return std::min(blocks, running_blocks(kernel, threads, shared_bytes));
}

}  // namespace tse
