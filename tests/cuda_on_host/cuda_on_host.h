// What CUDA kernels see when they are compiled as ordinary C++ for the host executor (executor.h).
// Included by common/cuda/launch.h alone, under TSE_CUDA_ON_HOST. NVIDIA's own headers supply the vector and half
// types, which are exact on the host; everything here is the part of CUDA C++ that the kernels of this project use.
#pragma once
#define __global__
#define __device__
#define __host__
#define __shared__ static_assert(false, "use TSE_SHARED")
#define __launch_bounds__(...)
#define TSE_NOINLINE

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <vector_types.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <tuple>

#include "common/cuda/plan.h"
#include "executor.h"

#define threadIdx (::cuda_on_host::current->thread)
#define blockIdx (::cuda_on_host::current->block)
#define blockDim (::cuda_on_host::current->block_dim)
#define gridDim (::cuda_on_host::current->grid_dim)

// Where the kernel stands: a default argument is evaluated at the call.
#define TSE_HERE ::cuda_on_host::Location here = {__builtin_FILE(), __builtin_LINE()}

// One array per block and place in the source (and template instantiation), with red zones under AddressSanitizer.
#define TSE_SHARED(type, name, count)                                                        \
  type* const name = []() {                                                                  \
    static char place;                                                                       \
    return static_cast<type*>(::cuda_on_host::shared_array(&place, sizeof(type) * (count))); \
  }()
#define TSE_DEVICE_ARRAY(type, name, count) type name[count]
#define TSE_DYNAMIC_SHARED(type, name) type* const name = static_cast<type*>(::cuda_on_host::dynamic_shared())

inline void __syncthreads(TSE_HERE) { ::cuda_on_host::block_barrier(here); }
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32, TSE_HERE) {
  static_assert(sizeof(T) <= 8, "a shuffle moves at most 8 bytes");
  const int lane = ::cuda_on_host::current->thread.x % 32, source = lane ^ lane_mask;
  T result;
  ::cuda_on_host::warp_exchange(here, mask, &value, sizeof(T), source > (lane | (width - 1)) ? lane : source, &result);
  return result;
}
inline void __syncwarp(unsigned mask = 0xffffffffu, TSE_HERE) { ::cuda_on_host::warp_barrier(here, mask); }
inline int __any_sync(unsigned mask, int predicate, TSE_HERE) {
  for (int lanes = 16; lanes > 0; lanes /= 2) predicate |= __shfl_xor_sync(mask, predicate, lanes, 32, here);
  return predicate;
}
inline int __ffsll(long long x) { return __builtin_ffsll(x); }

// Rounded down: what was rounded up is taken one back.
inline float __double2float_rd(double x) {
  const float f = float(x);
  return double(f) > x ? std::nextafter(f, -HUGE_VALF) : f;
}
inline double __dadd_rd(double a, double b) {
  const double s = a + b, of_b = s - a, error = (a - (s - of_b)) + (b - of_b);
  return error < 0 ? std::nextafter(s, -HUGE_VAL) : s;
}
inline float __fadd_rd(float a, float b) { return __double2float_rd(__dadd_rd(a, b)); }
inline void __threadfence() { ::cuda_on_host::fence(); }
inline unsigned atomicInc(unsigned* p, unsigned last) { return ::cuda_on_host::atomic_increment(p, last); }

namespace tse {

using std::ceil;  // CUDA's are overloaded for float, the host's in the global namespace are not
using std::exp;
using std::exp2;
using std::expm1;
using std::fma;
using std::fmax;
using std::fmin;
using std::frexp;
using std::ldexp;
using std::log;
using std::log1p;
using std::log2;
using std::tanh;

inline void device_assert(bool condition, const char* text) {
  if (!condition) ::cuda_on_host::fail(std::string("device-side assertion: ") + text);
}

inline uint4 load16(const void* p) {
  if (reinterpret_cast<uintptr_t>(p) % 16 != 0) ::cuda_on_host::fail("misaligned 16-byte load");
  return *static_cast<const uint4*>(p);
}
inline uint4 load16_again(const void* p) { return load16(p); }
inline void store16(void* p, uint4 v) {
  if (reinterpret_cast<uintptr_t>(p) % 16 != 0) ::cuda_on_host::fail("misaligned 16-byte store");
  *static_cast<uint4*>(p) = v;
}
inline uint4 unseen(uint4 v) { return v; }
inline float fast_exp2(float x) { return std::exp2(x); }
template <class A>
A fast_sqrt(A x) {
  return std::sqrt(x);
}
inline __half larger_of(__half a, __half b) { return __float2half_rn(std::fmax(__half2float(a), __half2float(b))); }
inline __nv_bfloat16 larger_of(__nv_bfloat16 a, __nv_bfloat16 b) {
  return __float2bfloat16_rn(std::fmax(__bfloat162float(a), __bfloat162float(b)));
}
template <class Two>
Two max_of_pairs(Two a, Two b) {
  return {larger_of(a.x, b.x), larger_of(a.y, b.y)};
}

inline DeviceLimits device_limits() {
  const auto& o = ::cuda_on_host::options;
  return {o.multiprocessors, /*threads_per_multiprocessor=*/2048, o.shared_bytes, o.shared_bytes + 1024};
}
template <class... Params>
int64_t running_blocks(void (*)(Params...), int threads, size_t shared_bytes) {
  return resident_blocks(device_limits(), threads, shared_bytes) * device_limits().multiprocessors;
}

// A launch is over when it returns, so each OS thread is a stream. One that failed leaves memory on the device as it
// was then: nobody comes back to that stream.
struct LaunchOrder {
  int device;
  const void* thread;
  int failures;
  unsigned long long capture = 0;  // there are none
  bool operator<(const LaunchOrder& o) const { return std::tie(thread, failures) < std::tie(o.thread, o.failures); }
};
inline thread_local int launch_failures = 0;
inline LaunchOrder launch_order(struct CUstream_st*) { return {0, &launch_failures, launch_failures}; }
template <class V, size_t kCount>
V* device_address(V (&array)[kCount]) {
  return array;
}
inline void zero_memory(void* p, size_t bytes, struct CUstream_st*) { std::memset(p, 0, bytes); }

template <class... Params, class... Args>
void launch(const char* name, void (*kernel)(Params...), int64_t blocks, int threads, size_t shared_bytes,
            struct CUstream_st*, Args... args) try {
  ::cuda_on_host::launch(name, blocks, threads, shared_bytes, [=] { kernel(args...); });
} catch (...) {
  ++launch_failures;
  throw;
}

}  // namespace tse
