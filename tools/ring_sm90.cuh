// Barriers in shared memory, bulk copies that complete on them, and clusters: what ring.cuh takes from sm_90. [CUDA]
#pragma once
#include "common/cuda/vec.cuh"

namespace ring {

// Counts arrivals, and bytes of copies, of one phase after another. Whoever waits names the parity of a phase: of the
// first one 0; phase -1, of parity 1, is complete from the start.
struct Barrier {
  uint64_t word;
};

__device__ inline unsigned shared_address(const void* p) { return static_cast<unsigned>(__cvta_generic_to_shared(p)); }

__device__ inline void init(Barrier* b, unsigned arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(b)), "r"(arrivals) : "memory");
}
// After all init(), by the same thread: other blocks of the cluster and bulk copies see the barriers.
__device__ inline void publish_barriers() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

__device__ inline void arrive(Barrier* b) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(b)) : "memory");
}
// And announces the bytes that a copy will bring.
__device__ inline void arrive_expecting(Barrier* b, unsigned bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(b)), "r"(bytes)
               : "memory");
}

constexpr unsigned kPatience = 1u << 24;  // tries, each of which may sleep: a stuck kernel stops instead of hanging

// kAcrossBlocks: what blocks of the cluster wrote before they arrived is seen.
template <bool kAcrossBlocks = false>
__device__ inline void wait(Barrier* b, unsigned parity) {
#pragma unroll 1
  for (unsigned tries = 0; tries < kPatience; ++tries) {
    unsigned done;
    if constexpr (kAcrossBlocks)
      asm volatile(
          "{ .reg .pred p; mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; "
          "}"
          : "=r"(done)
          : "r"(shared_address(b)), "r"(parity)
          : "memory");
    else
      asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
                   : "=r"(done)
                   : "r"(shared_address(b)), "r"(parity)
                   : "memory");
    if (done) return;
  }
  __trap();
}

// Copies from global memory, both addresses and the size multiples of 16; the barrier counts the bytes.
__device__ inline void bulk_load(void* to, const void* from, unsigned bytes, Barrier* b) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(to)),
               "l"(__cvta_generic_to_global(from)), "r"(bytes), "r"(shared_address(b))
               : "memory");
}

// ---- clusters -------------------------------------------------------------------------------------------------------

__device__ inline int cluster_rank() {
  int rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
// All threads of all blocks.
__device__ inline void cluster_barrier() {
  asm volatile("barrier.cluster.arrive.release.aligned;\n barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// Where block `rank` of the cluster has what this block has at p.
__device__ inline unsigned remote_address(const void* p, int rank) {
  unsigned address;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared_address(p)), "r"(rank));
  return address;
}
__device__ inline void store_remote(float* p, int rank, float v) {
  asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(remote_address(p, rank)), "f"(v) : "memory");
}
__device__ inline void store_remote(float2* p, int rank, float2 v) {
  asm volatile("st.shared::cluster.v2.f32 [%0], {%1, %2};" ::"r"(remote_address(p, rank)), "f"(v.x), "f"(v.y)
               : "memory");
}
__device__ inline void arrive_remote(Barrier* b, int rank) {
  asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(remote_address(b, rank))
               : "memory");
}

// ---- some threads of a block ----------------------------------------------------------------------------------------

template <int kThreads>
__device__ inline void barrier_of() {
  asm volatile("bar.sync 1, %0;" ::"n"(kThreads) : "memory");
}

// The largest float of the warp, none of which is NaN: as integers of the same order.
__device__ inline float warp_max(float v) {
  const auto flip = [](int bits) { return bits ^ (bits >> 31 & 0x7fffffff); };
  return __int_as_float(flip(__reduce_max_sync(0xffffffffu, flip(__float_as_int(v)))));
}

}  // namespace ring
