// Cross-entropy by a ring of shared memory that is filled across rows: a candidate of the sweep. Not run on a card yet.
// [CUDA]
//
// A block stays on its multiprocessor. One warp of it, the producer, copies the block's rows into a ring of stages, row
// after row, without waiting for what becomes of them; the others, the consumers, sum a row out of the ring, agree on
// its sum, and write the gradient out of the ring again. As soon as a stage is read for the last time, the next row's
// elements go there: memory is read while a row is reduced and its gradient is written. A row larger than the ring
// has a cluster of 2 or 4 blocks, each with a slice of it.
//
// Options: ignore_index, and grad_output 1 for a mean. Logits below -1e29 count as -inf.
#pragma once
#include <algorithm>
#include <stdexcept>

#include "common/cuda/row.cuh"
#include "common/cuda/stream_state.cuh"
#include "common/exp_sum.h"
#include "cross_entropy/cross_entropy.h"
#include "ring_sm90.cuh"
#include "ring_sum.cuh"

namespace ring {

using tse::from_acc;
using tse::store16;
using tse::to_acc;
using tse::Vec;

constexpr int kStages = 13, kStageVectors = 1024;
constexpr int64_t kRingBytes = int64_t(kStages) * kStageVectors * 16;

struct Params {
  const void* x;  // (rows, n), contiguous
  const int64_t* target;
  int64_t rows, n, ignore_index;
  float *row_loss, *row_m, *row_sum;  // row_loss: nullptr for a mean
  void* grad;  // aligned as x
  float* loss;  // of a mean
};

// What outlives a launch; launches that write a mean must not overlap.
struct State {
  unsigned ticket;
  double sums[1024];  // of blocks
};
TSE_DEVICE_ARRAY(State, state, 1);

struct Position {
  int stage = 0;
  unsigned parity = 0;
  __device__ void advance() {
    if (++stage < kStages) return;
    stage = 0;
    parity ^= 1;
  }
};

// The part of a row that a block of the cluster has: `count` vectors from vector `first` of the row's aligned part.
// Block 0 also has the elements before and after that part, less than two vectors.
template <class T, int kCluster>
struct Slice {
  static constexpr int kSize = Vec<T>::kSize;
  int64_t n;
  int head, first, count, vectors;
  __device__ Slice(const T* x, int64_t n, int rank) : n(n), head(int(tse::unaligned_head(x, n))) {
    vectors = int((n - head) / kSize);
    const int share = ((vectors + kCluster - 1) / kCluster + 7) / 8 * 8;  // whole lines of 128 bytes
    first = min(rank * share, vectors);
    count = min(share, vectors - first);
  }
  __device__ int64_t begin() const { return head + int64_t(first) * kSize; }
  __device__ int loose_count() const { return int(n - int64_t(vectors) * kSize); }
  __device__ int64_t loose(int number) const { return number < head ? number : number + int64_t(vectors) * kSize; }
  // The number of a loose element; -1 of one in a vector.
  __device__ int loose_number(int64_t i) const {
    if (i < head) return int(i);
    const int64_t tail = head + int64_t(vectors) * kSize;
    return i < tail ? -1 : int(i - tail) + head;
  }
  // The vector of the slice that has element i of the aligned part; outside [0, count) in another slice.
  __device__ int vector_of(int64_t i) const { return int((i - head) / kSize) - first; }
};

// kMean: writes the gradient, and the mean. Blocks of kConsumers + 32 threads.
template <class T, bool kMean, int kCluster, int kConsumers>
__global__ void __launch_bounds__(kConsumers + 32, 1) cross_entropy_ring_kernel(Params p) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  constexpr int kWarps = kConsumers / 32, kPartials = kCluster * kWarps, kLoads = kStageVectors / kConsumers;
  constexpr int kSize = Vec<T>::kSize;
  static_assert(kPartials <= 64 && kStageVectors % kConsumers == 0);
  TSE_DYNAMIC_SHARED(uint4, stages);
  TSE_SHARED(Barrier, full, kStages);  // the copy has arrived
  TSE_SHARED(Barrier, empty, kStages);  // all consumers have read it for the last time
  TSE_SHARED(Barrier, exchanged, 1);  // all warps of the cluster have sent their sums of the row
  TSE_SHARED(float2, partials, 2 * kPartials);  // of this row and of the one before
  TSE_SHARED(float, target_logits, 2);
  TSE_SHARED(int, counted, 1);
  const int thread = int(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int rank = kCluster == 1 ? 0 : cluster_rank();
  const int64_t first_row = blockIdx.x / kCluster, row_step = gridDim.x / kCluster;
  const auto target_of = [&](int64_t row) { return row < p.rows ? p.target[row] : p.ignore_index; };
  if (thread == 0) {
    for (int s = 0; s < kStages; ++s) {
      init(full + s, 1);
      init(empty + s, kWarps);
    }
    init(exchanged, kPartials);
    counted[0] = 0;
    publish_barriers();
  }
  if constexpr (kCluster > 1) cluster_barrier();
  else __syncthreads();

  double loss_sum = 0;  // of thread 0 of the cluster
  float count = 1;
  if (warp == kWarps) {
    // ---- the producer
    Position at;
    int64_t target = target_of(first_row);
    for (int64_t row = first_row; lane == 0 && row < p.rows; row += row_step) {
      const bool is_counted = target != p.ignore_index;
      target = target_of(row + row_step);  // arrives while the row is copied
      if (!is_counted) continue;
      const T* const x = static_cast<const T*>(p.x) + row * p.n;
      const Slice<T, kCluster> slice(x, p.n, rank);
      const T* from = x + slice.begin();
      for (int left = slice.count; left > 0; left -= kStageVectors) {
        const unsigned bytes = unsigned(min(left, kStageVectors)) * 16;
        wait(empty + at.stage, at.parity ^ 1);
        arrive_expecting(full + at.stage, bytes);
        bulk_load(stages + at.stage * kStageVectors, from, bytes, full + at.stage);
        from += kStageVectors * kSize;
        at.advance();
      }
    }
    __syncwarp();
  } else {
    // ---- the consumers
    if constexpr (kMean) {  // each block counts for itself, while the first row is on its way
      int mine = 0;
      for (int64_t row = thread; row < p.rows; row += kConsumers) mine += p.target[row] != p.ignore_index;
      mine = __reduce_add_sync(0xffffffffu, mine);
      if (lane == 0) atomicAdd(counted, mine);
      barrier_of<kConsumers>();
      count = float(counted[0]);
    }
    constexpr unsigned kNothing = sizeof(T) == 2 ? 0xff80ff80u : 0xff800000u;  // -inf
    const auto release = [&](int stage) {
      __syncwarp();
      if (lane == 0) arrive(empty + stage);
    };
    // This thread's vectors of a stage, whose first vector is `begin` of `end`.
    const auto load = [&](int stage, int begin, int end, uint4(&v)[kLoads]) {
      const uint4* const from = stages + stage * kStageVectors + thread;
      if (begin + kStageVectors <= end) {
#pragma unroll
        for (int j = 0; j < kLoads; ++j) v[j] = from[j * kConsumers];
      } else {
#pragma unroll
        for (int j = 0; j < kLoads; ++j)
          v[j] = begin + j * kConsumers + thread < end ? from[j * kConsumers]
                                                       : uint4{kNothing, kNothing, kNothing, kNothing};
      }
    };

    Position at;
    unsigned parity = 0;  // of the row among the counted ones
    int64_t next_target = target_of(first_row);
    for (int64_t row = first_row; row < p.rows; row += row_step) {
      const int64_t target = next_target;
      next_target = target_of(row + row_step);
      const T* const x = static_cast<const T*>(p.x) + row * p.n;
      T* const g = static_cast<T*>(p.grad) + row * p.n;
      const Slice<T, kCluster> slice(x, p.n, rank);
      T* const g_slice = g + slice.begin();
      const bool has_loose = rank == 0 && thread < slice.loose_count();
      if (target == p.ignore_index) {
        if constexpr (kMean) {
          for (int k = thread; k < slice.count; k += kConsumers) store16(g_slice + k * kSize, uint4{0, 0, 0, 0});
          if (has_loose) g[slice.loose(thread)] = from_acc<T>(0);
        } else if (rank == 0 && thread == 0) {
          p.row_loss[row] = 0;
        }
        continue;
      }
      tse::device_assert(target >= 0 && target < p.n, "ring: target: expected a class index or ignore_index");
      const float loose = has_loose ? to_acc(x[slice.loose(thread)]) : -tse::infinity<float>();
      const int target_loose = slice.loose_number(target);
      const int target_vector = target_loose >= 0 ? -1 : slice.vector_of(target);
      const bool has_target = target_loose >= 0 ? rank == 0 : target_vector >= 0 && target_vector < slice.count;

      Sum s;
      float target_logit = 0;
      Position again = at;
      for (int begin = 0; begin < slice.count; begin += kStageVectors) {
        uint4 v[kLoads];
        wait(full + at.stage, at.parity);
        load(at.stage, begin, slice.count, v);
        if (target_vector >= begin && target_vector < begin + kStageVectors && has_target) {
          const T* const of_stage = reinterpret_cast<const T*>(stages + at.stage * kStageVectors);
          target_logit = to_acc(of_stage[(target_vector - begin) * kSize + int(target - slice.head) % kSize]);
        }
        if constexpr (!kMean) release(at.stage);
        add<T>(s, v);
        at.advance();
      }
      if (warp == 0 && slice.loose_count() > 0) {
        s.add(loose);
        if (target_loose >= 0) target_logit = __shfl_sync(0xffffffffu, loose, target_loose);
      }

      // Every warp sends its sum to all blocks of the cluster, and joins what all have sent. The arrays are those of
      // the row before last: every warp has read them, or it would not have sent its sum of the last row.
      s = warp_sum<32>(s);
      float2* const of_row = partials + parity * kPartials;
      if (lane < kCluster) {
        float2* const place = of_row + rank * kWarps + warp;
        if constexpr (kCluster == 1) {
          *place = {s.m, s.sum};
          if (warp == 0) target_logits[parity] = target_logit;
          arrive(exchanged);
        } else {
          store_remote(place, lane, {s.m, s.sum});
          if (warp == 0 && has_target) store_remote(target_logits + parity, lane, target_logit);
          arrive_remote(exchanged, lane);
        }
      }
      wait<(kCluster > 1)>(exchanged, parity);
      s = {of_row[lane % kPartials].x, of_row[lane % kPartials].y};
      if constexpr (kPartials > 32) {
        const float2 other = of_row[lane + 32];
        const float m = fmaxf(s.m, other.x);
        s = {m, s.sum * tse::fast_exp2(s.m - m) + other.y * tse::fast_exp2(other.x - m)};
      }
      s = warp_sum<(kPartials < 32 ? kPartials : 32)>(s);
      target_logit = target_logits[parity];
      parity ^= 1;

      if (rank == 0 && thread == 0) {
        const float loss = (log2f(s.sum) - fmaf(target_logit, kLog2e, -s.m)) * tse::kLn2<float>;
        if constexpr (!kMean) p.row_loss[row] = loss;
        p.row_m[row] = s.m;
        p.row_sum[row] = s.sum;
        loss_sum += double(loss);
      }
      if constexpr (kMean) {
        const float factor = 1 / (count * s.sum);
        for (int begin = 0; begin < slice.count; begin += kStageVectors) {
          uint4 v[kLoads];
          load(again.stage, begin, slice.count, v);
          release(again.stage);
#pragma unroll
          for (int j = 0; j < kLoads; ++j) {
            const int k = begin + j * kConsumers + thread;
            if (k < slice.count) store16(g_slice + int64_t(k) * kSize, gradient<T>(s, factor, v[j]));
          }
          again.advance();
        }
        if (has_loose) g[slice.loose(thread)] = from_acc<T>(s.term(loose) * factor);
        // The target's element is written once more by the thread that has just written it.
        if (has_target && thread == (target_loose >= 0 ? target_loose : target_vector % kConsumers))
          g[target] = from_acc<T>(s.term(target_logit) * factor - 1 / count);
      }
    }
  }

  if constexpr (kCluster > 1) cluster_barrier();  // nobody leaves to whom another block may still write
  if constexpr (kMean) {
    if (thread == 0) state[0].sums[blockIdx.x] = loss_sum;
    if (!tse::is_last_block(&state[0].ticket) || warp != 0) return;
    double sum = 0;
    for (int block = lane; block < int(gridDim.x); block += 32) sum += state[0].sums[block];
    for (int mask = 16; mask > 0; mask /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, mask);
    if (thread == 0) *p.loss = float(sum / double(count));
  }
#endif
}

// Whether a slice of the row fits into the ring: it is read twice where the gradient is written.
template <int kCluster>
bool fits(int64_t row_bytes) {
  return row_bytes / kCluster + 16 * 8 <= kRingBytes;
}

// Blocks that run at a time, in whole clusters; no more than `most`, if that is not 0.
template <int kCluster, class Kernel>
int64_t running_blocks(Kernel* kernel, int threads, int most) {
  int clusters = tse::device_limits().multiprocessors;
  if constexpr (kCluster > 1) {
    cudaLaunchConfig_t config{};
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {kCluster, 1, 1};
    config.gridDim = dim3(unsigned(clusters / kCluster * kCluster));
    config.blockDim = dim3(unsigned(threads));
    config.dynamicSmemBytes = kRingBytes;
    config.attrs = &attribute;
    config.numAttrs = 1;
    tse::check_cuda(cudaOccupancyMaxActiveClusters(&clusters, kernel, &config), "cudaOccupancyMaxActiveClusters");
  }
  if (most > 0) clusters = std::min(clusters, std::max(1, most / kCluster));
  if (clusters < 1) throw std::runtime_error("ring: no cluster of this size fits on the card");
  return int64_t(clusters) * kCluster;
}

template <class T, bool kMean, int kCluster, int kConsumers>
void launch(const Params& p, int most_blocks) {
  const auto kernel = cross_entropy_ring_kernel<T, kMean, kCluster, kConsumers>;
  tse::check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(kRingBytes)),
                  "asking for the ring's shared memory");
  static const int64_t running = running_blocks<kCluster>(kernel, kConsumers + 32, most_blocks);
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {kCluster, 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(std::min(running, p.rows * kCluster)));
  config.blockDim = dim3(kConsumers + 32);
  config.dynamicSmemBytes = kRingBytes;
  config.attrs = &attribute;
  config.numAttrs = 1;
  tse::check_cuda(cudaLaunchKernelEx(&config, kernel, p), "the launch of cross_entropy_ring_kernel");
}

// Forward of "none", or forward and gradient of a mean.
template <int kCluster, int kConsumers>
void launch_cross_entropy(const tse::CrossEntropyParams& p, int most_blocks) {
  const bool is_mean = p.reduction == tse::Reduction::kMean;
  const Params params = {p.input,
                         static_cast<const int64_t*>(p.target),
                         tse::row_count(p.rows),
                         p.rows.n,
                         p.ignore_index,
                         static_cast<float*>(p.row_loss),
                         static_cast<float*>(p.row_m),
                         static_cast<float*>(p.row_sum),
                         p.grad_input,
                         static_cast<float*>(p.loss)};
  const bool is_bf16 = p.dtype == tse::DType::kBFloat16;
  if (is_bf16 && is_mean) launch<__nv_bfloat16, true, kCluster, kConsumers>(params, most_blocks);
  else if (is_bf16) launch<__nv_bfloat16, false, kCluster, kConsumers>(params, most_blocks);
  else if (is_mean) launch<float, true, kCluster, kConsumers>(params, most_blocks);
  else launch<float, false, kCluster, kConsumers>(params, most_blocks);
}

}  // namespace ring
