// Memory on the device, the kernels of the roofs, and times of interleaved launches. [CUDA]
#pragma once
#include <cstring>
#include <functional>
#include <memory>

#include "common/cuda/launch.h"
#include "gpu_sweep.h"

#define SWEEP_CHECK(call) tse::check_cuda(call, #call)

namespace sweep {

constexpr int64_t kMiB = 1 << 20;

// Device memory of its exact size, so that compute-sanitizer finds an access past its end.
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t bytes) : bytes_(bytes) {
    void* p = nullptr;
    if (bytes > 0) SWEEP_CHECK(cudaMalloc(&p, bytes));
    memory_.reset(p);
  }
  template <class V = void>
  V* as() const {
    return static_cast<V*>(memory_.get());
  }
  int64_t bytes() const { return bytes_; }
  // NaN in every type of float.
  void poison() { fill(0xff); }
  void fill(int byte) {
    if (bytes_ > 0) SWEEP_CHECK(cudaMemset(as(), byte, bytes_));
  }

 private:
  struct Free {
    void operator()(void* p) const { cudaFree(p); }
  };
  int64_t bytes_ = 0;
  std::unique_ptr<void, Free> memory_;
};

// ---- roofs ----------------------------------------------------------------------------------------------------------

constexpr int kRoofThreads = 256, kRoofLoads = 8;

__global__ void null_kernel() {}

// load(i) for this thread's vectors, all under way together; then use(i, value).
template <class V, class Load, class Use>
__device__ inline void for_roof_vectors(int64_t count, const Load& load, const Use& use) {
  const int64_t first = int64_t(blockIdx.x) * kRoofThreads * kRoofLoads + threadIdx.x;
  V values[kRoofLoads] = {};
#pragma unroll
  for (int j = 0; j < kRoofLoads; ++j)
    if (first + j * kRoofThreads < count) values[j] = load(first + j * kRoofThreads);
#pragma unroll
  for (int j = 0; j < kRoofLoads; ++j)
    if (first + j * kRoofThreads < count) use(first + j * kRoofThreads, values[j]);
}

// What the compiler must take for a result of the loads. Nobody reads it, and hardly ever it is written.
__device__ unsigned folded_once;

__global__ void __launch_bounds__(kRoofThreads) read_kernel(const uint4* x, int64_t count) {
  unsigned folded = 0;
  for_roof_vectors<uint4>(
      count, [&](int64_t i) { return tse::load16(x + i); }, [&](int64_t, uint4 v) { folded ^= v.x ^ v.y ^ v.z ^ v.w; });
  if (folded == 0x9e3779b9u) folded_once = folded;
}

__global__ void __launch_bounds__(kRoofThreads) copy_kernel(const uint4* x, uint4* y, int64_t count) {
  for_roof_vectors<uint4>(
      count, [&](int64_t i) { return tse::load16(x + i); }, [&](int64_t i, uint4 v) { tse::store16(y + i, v); });
}

struct Two {
  uint4 a, b;
};
__global__ void __launch_bounds__(kRoofThreads) add_kernel(const uint4* a, const uint4* b, uint4* y, int64_t count) {
  for_roof_vectors<Two>(
      count, [&](int64_t i) { return Two{tse::load16(a + i), tse::load16(b + i)}; },
      [&](int64_t i, const Two& v) {
        tse::store16(y + i, uint4{v.a.x + v.b.x, v.a.y + v.b.y, v.a.z + v.b.z, v.a.w + v.b.w});
      });
}

inline int64_t roof_blocks(int64_t bytes) { return tse::grid_for(bytes / 16, kRoofThreads * kRoofLoads); }

// Of bytes / 16 vectors: what is left over is less than one of them.
inline void launch_read(const void* x, int64_t bytes) {
  tse::launch("read_kernel", read_kernel, roof_blocks(bytes), kRoofThreads, 0, nullptr, static_cast<const uint4*>(x),
              bytes / 16);
}
inline void launch_copy(const void* x, void* y, int64_t bytes) {
  tse::launch("copy_kernel", copy_kernel, roof_blocks(bytes), kRoofThreads, 0, nullptr, static_cast<const uint4*>(x),
              static_cast<uint4*>(y), bytes / 16);
}
inline void launch_memcpy(const void* x, void* y, int64_t bytes) {
  SWEEP_CHECK(cudaMemcpyAsync(y, x, bytes, cudaMemcpyDeviceToDevice, nullptr));
}
inline void launch_add(const void* a, const void* b, void* y, int64_t bytes) {
  tse::launch("add_kernel", add_kernel, roof_blocks(bytes), kRoofThreads, 0, nullptr, static_cast<const uint4*>(a),
              static_cast<const uint4*>(b), static_cast<uint4*>(y), bytes / 16);
}

// ---- latency --------------------------------------------------------------------------------------------------------

constexpr int kLineWords = 32;  // 128 bytes

// Line i names line (a i + c) mod `lines`, a power of two: one cycle through all lines, in no order that is prefetched.
__global__ void link_kernel(unsigned* chain, unsigned lines) {
  for (unsigned i = blockIdx.x * blockDim.x + threadIdx.x; i < lines; i += gridDim.x * blockDim.x)
    chain[int64_t(i) * kLineWords] = (1664525u * i + 1013904223u) & (lines - 1);
}
__global__ void chase_kernel(const unsigned* chain, unsigned steps, unsigned* last) {
  unsigned i = 0;
  for (unsigned step = 0; step < steps; ++step) i = __ldcg(chain + int64_t(i) * kLineWords);
  *last = i;
}

// ---- times ----------------------------------------------------------------------------------------------------------

class Event {
 public:
  Event() { SWEEP_CHECK(cudaEventCreate(&event_)); }
  ~Event() { cudaEventDestroy(event_); }
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;
  void record() { SWEEP_CHECK(cudaEventRecord(event_, nullptr)); }
  double us_since(const Event& begin) const {
    float ms = 0;
    SWEEP_CHECK(cudaEventElapsedTime(&ms, begin.event_, event_));
    return 1e3 * ms;
  }

 private:
  cudaEvent_t event_ = nullptr;
};

class Clock {
 public:
  Clock() {
    int device = 0, l2 = 0;
    SWEEP_CHECK(cudaGetDevice(&device));
    SWEEP_CHECK(cudaDeviceGetAttribute(&l2, cudaDevAttrL2CacheSize, device));
    flushed_ = Buffer(std::max<int64_t>(4 * int64_t(l2), 512 * kMiB));
    flushed_.fill(0);
  }

  // Replaces what L2 holds by reading: no dirty line is left to be written back during the next launch. It takes longer
  // than the host needs to queue that launch, so that no gap is timed either.
  void flush() const { launch_read(flushed_.as(), flushed_.bytes()); }

  // Microseconds, a list for each launch. In a round every launch runs once; each round begins with another one, and
  // the first round only warms up.
  std::vector<std::vector<double>> times(const std::vector<std::function<void()>>& launches, int rounds) const {
    const size_t count = launches.size();
    std::vector<std::vector<double>> us(count);
    std::vector<Event> begin(count), end(count);
    for (int round = -1; round < rounds; ++round) {
      for (size_t i = 0; i < count; ++i) {
        const size_t which = (i + round + 1) % count;
        flush();
        begin[which].record();
        launches[which]();
        end[which].record();
      }
      SWEEP_CHECK(cudaDeviceSynchronize());
      for (size_t i = 0; round >= 0 && i < count; ++i) us[i].push_back(end[i].us_since(begin[i]));
    }
    return us;
  }

 private:
  Buffer flushed_;
};

// Clocks, power and temperature while the device is busy; nothing without nvidia-smi.
inline Fields read_clocks(const Clock& clock) {
  char bus[32] = "";
  int device = 0;
  SWEEP_CHECK(cudaGetDevice(&device));
  SWEEP_CHECK(cudaDeviceGetPCIBusId(bus, sizeof bus, device));
  std::string command = "nvidia-smi --format=csv,noheader,nounits --id=" + std::string(bus) + " --query-gpu=";
  for (const char* field : kClockFields) command += std::string(field) + ',';
  command.back() = ' ';
  for (int i = 0; i < 200; ++i) clock.flush();
  std::string output;
  if (FILE* pipe = popen((command + "2>/dev/null").c_str(), "r")) {
    char text[256];
    while (std::fgets(text, sizeof text, pipe) != nullptr) output += text;
    pclose(pipe);
  }
  SWEEP_CHECK(cudaDeviceSynchronize());
  return parse_clocks(output);
}

// ---- the roofs' own blocks ------------------------------------------------------------------------------------------

inline Result roof_result(const std::string& name, const std::vector<double>& us) {
  Result r{name, /*is_roof=*/false};
  r.us = us;
  return r;
}

// A launch that does nothing, and reads, copies and additions of tensors of several sizes.
inline Block roofs(const Clock& clock, int rounds) {
  constexpr int64_t kSizes[] = {1, 4, 16, 64, 256, 1024};  // MiB
  Block block{"roofs"};
  const Buffer a(kSizes[5] * kMiB), b(kSizes[5] * kMiB), y(kSizes[5] * kMiB);
  std::vector<std::string> names = {"null"};
  std::vector<std::function<void()>> launches = {[] { tse::launch("null_kernel", null_kernel, 1, 32, 0, nullptr); }};
  for (int64_t size : kSizes) {
    const int64_t bytes = size * kMiB;
    const std::string of = ' ' + std::to_string(size) + " MiB";
    names.insert(names.end(), {"read" + of, "copy" + of, "memcpy" + of, "add" + of});
    launches.push_back([&, bytes] { launch_read(a.as(), bytes); });
    launches.push_back([&, bytes] { launch_copy(a.as(), y.as(), bytes); });
    launches.push_back([&, bytes] { launch_memcpy(a.as(), y.as(), bytes); });
    launches.push_back([&, bytes] { launch_add(a.as(), b.as(), y.as(), bytes); });
  }
  const auto us = clock.times(launches, rounds);
  for (size_t i = 0; i < us.size(); ++i) block.results.push_back(roof_result(names[i], us[i]));
  return block;
}

// Microseconds of one load that depends on the one before: from L2, from memory within the reach of the TLB, and from
// more memory than that.
inline Block latency(const Clock& clock, int rounds) {
  Block block{"roofs: latency of a load"};
  const auto chase = [&](const char* name, int64_t bytes, bool is_cold) {
    const unsigned lines = unsigned(bytes / (4 * kLineWords)), steps = 8192;
    const Buffer chain(bytes), last(4);
    tse::launch("link_kernel", link_kernel, 1024, 256, 0, nullptr, chain.as<unsigned>(), lines);
    const auto launch = [&] {
      tse::launch("chase_kernel", chase_kernel, 1, 1, 0, nullptr, static_cast<const unsigned*>(chain.as<unsigned>()),
                  steps, last.as<unsigned>());
    };
    std::vector<double> us;
    Event begin, end;
    for (int round = 0; round < std::min(rounds, 5); ++round) {
      if (is_cold) clock.flush();
      else launch();
      begin.record();
      launch();
      end.record();
      SWEEP_CHECK(cudaDeviceSynchronize());
      us.push_back(end.us_since(begin) / steps);
    }
    block.results.push_back(roof_result(name, us));
  };
  chase("L2, 1 MiB", kMiB, false);
  chase("DRAM, 64 MiB", 64 * kMiB, true);
  chase("DRAM, 4 GiB", 4096 * kMiB, true);
  return block;
}

}  // namespace sweep
