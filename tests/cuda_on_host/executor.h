// Runs the threads of a CUDA block as fibres on one OS thread, so that kernels can be executed, and their mistakes
// found, where there is no GPU. For the test suite only.
//
// What it models: blocks one after another, threads switching only at barriers and warp operations, in ascending or
// descending order (a pair of threads that race inside a barrier interval goes wrong in one of the two); warp
// operations that meet by mask, without implicit lock-step; shared memory per block, filled with NaN, with red zones.
// What it reports, by an exception out of launch(): threads at different barriers, a thread that returned before a
// barrier, lanes that never come or stand elsewhere, shuffles from lanes outside the mask, deadlock. Out-of-bounds
// accesses are AddressSanitizer's, races ThreadSanitizer's: executor.cpp tells both about the fibres.
// What it does not model: time, weak memory, the rounding of ex2.approx.
#pragma once
#include <vector_types.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>

namespace cuda_on_host {

struct Location {
  const char* file;
  int line;
};

struct ThreadIndex {
  uint3 thread, block;
  dim3 block_dim, grid_dim;
};
extern thread_local ThreadIndex* current;  // of the running fibre

struct Options {
  bool descending = false;                   // threads and blocks, last first
  int64_t first_block = 0, last_block = -1;  // run only these: index arithmetic on huge sparse buffers
  // The card: few multiprocessors, so that blocks stride over rows; little shared memory, so that rows do not fit.
  int multiprocessors = 4;
  int64_t shared_bytes = 227 * 1024;
};
// Start as TSE_CUDA_ORDER=descending, TSE_CUDA_ONLY_BLOCK, TSE_CUDA_MULTIPROCESSORS and TSE_CUDA_SHARED_BYTES say.
extern thread_local Options options;

// One-dimensional blocks of at most 1024 threads. Throws std::runtime_error with what went wrong.
void launch(const char* name, int64_t blocks, int threads, size_t dynamic_bytes, const std::function<void()>& body);
extern "C" int64_t cuda_on_host_launches();  // of this OS thread, so far

// For kernels.
void block_barrier(Location here);
void warp_barrier(Location here, unsigned mask);
void warp_exchange(Location here, unsigned mask, const void* value, size_t bytes, int source, void* result);
void fence();
unsigned atomic_increment(unsigned* p, unsigned last);  // to 0 from `last`; returns what was there
void* shared_array(const void* place, size_t bytes);
void* dynamic_shared();
[[noreturn]] void fail(const std::string& what);

// For banks.cpp.
bool is_shared(const void* p);  // of the running block
long long blocks_run();
void report_bank_conflicts();

}  // namespace cuda_on_host
