// Sparsemax forward on CUDA; sparsemax_cpu-inl.h tells the mathematics. [CUDA]
//
// Rows of up to 1024 elements stay in registers, of a warp or a quarter of one. Of a longer row, which a block has,
// every 16-byte vector is read once and compared with a lower bound of the threshold, known from the row's first
// vectors: the largest element minus 1. What lies below is dead: zeros are all that is left to do. What is alive is
// kept in shared memory as it was stored; Newton's steps and the result need nothing else. Vectors that do not fit
// there are read again, mostly a few, and from L2. So memory is passed once in each direction, and the result is exact
// for any n.
#include "common/cuda/reduce.cuh"
#include "sparsemax/row_parts.cuh"
#include "sparsemax/sparsemax.h"
#include "sparsemax/sparsemax_plan.h"
#include "sparsemax/support.cuh"

namespace tse {
namespace {

// Rounded down: a bound may let an element too many live, not one too few.
__device__ inline float add_down(float a, float b) { return __fadd_rd(a, b); }
__device__ inline double add_down(double a, double b) { return __dadd_rd(a, b); }

template <class A>
__device__ inline A larger(A a, A b) {
  return a > b ? a : b;
}
template <class A>
__device__ inline A reference_point(A max) {
  return max == -infinity<A>() ? A(0) : max;
}

template <class T, class A>
__device__ inline T probability(A above) {
  return from_acc<T>(above <= 0 ? A(0) : above);  // NaN stays
}

// ---- a row in registers -------------------------------------------------------------------------------------------

// Newton's steps over the lanes' elements. In so few elements rounding cannot lead them astray (support.cuh). Rows that
// share a warp go on together: those that are done repeat their last sum, which changes nothing.
template <int kLanes, int kCount, class A>
__device__ inline void newton(const A (&z)[kCount], Threshold<A>& tau) {
  for (;;) {
    SupportTotal<A> s = {0, 0};
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      const A above = tau.above(z[k]);
      if (above <= 0) continue;
      s.sum += above;
      ++s.count;
    }
    s = warp_reduce<kLanes>(s, [](const auto& a, const auto& b) { return join(a, b); });
    const A step = tau.rest + (s.sum - 1) / A(s.count > 1 ? s.count : 1);
    const A t = tau.t + step;
    const bool goes_on = s.count > 0 && fabs(s.sum - 1) > kSumTolerance<A>;  // count 0: a row of -inf alone
    const bool any_goes_on = __any_sync(0xffffffffu, goes_on);
    if (goes_on || !any_goes_on) tau = {t, step - (t - tau.t)};
    if (!any_goes_on) return;
  }
}

template <class T, int kLanes, int kElements>
__global__ void __launch_bounds__(kSmallBlock, kBlocksAtLeast<T, kLanes>) sparsemax_fwd_lanes_kernel(RowMapParams p) {
  using A = Acc<T>;
  constexpr int kSize = Vec<T>::kSize, kVectors = kElements / kSize;
  const int64_t rows = row_count(p.rows);
  const int lane = threadIdx.x % kLanes;
  const T low = from_acc<T>(-infinity<A>());
  // The lanes of a warp stay together, with rows or without.
  for (int64_t first = int64_t(blockIdx.x) * kRowsPerBlock<kLanes>; first < rows; first += row_step<kLanes>()) {
    const int64_t row = first + threadIdx.x / kLanes, offset = row < rows ? row : 0;
    const T* const x = static_cast<const T*>(p.input) + row_offset(p.rows, offset);
    T* const y = static_cast<T*>(p.output) + row_offset(p.output_rows, offset);
    const RowParts<T> parts(x, row < rows ? p.rows.n : 0);
    Vec<T> v[kVectors];
#pragma unroll
    for (int j = 0; j < kVectors; ++j) v[j] = parts.load_slot(x, true, lane + j * kLanes, low);
    A z[kElements], best[1] = {-infinity<A>()};
#pragma unroll
    for (int k = 0; k < kElements; ++k) {
      z[k] = to_acc(v[k / kSize].v[k % kSize]);
      best[0] = larger(z[k], best[0]);
    }
    const A m = reference_point(warp_reduce<kLanes>(best[0], [](A a, A b) { return larger(a, b); }));
#pragma unroll
    for (int k = 0; k < kElements; ++k) z[k] -= m;
    // The threshold of the lanes' largest elements is a good lower bound, and costs a fraction of a step.
    best[0] -= m;
    Threshold<A> tau;
    newton<kLanes>(best, tau);
    newton<kLanes>(z, tau);
    const bool aligned_alike = is_aligned_like(x, static_cast<const T*>(y));
#pragma unroll
    for (int j = 0; j < kVectors; ++j) {
#pragma unroll
      for (int k = 0; k < kSize; ++k) v[j].v[k] = probability<T>(tau.above(z[j * kSize + k]));
      parts.store_slot(y, aligned_alike, lane + j * kLanes, v[j]);
    }
  }
}

// ---- a row of a block ---------------------------------------------------------------------------------------------

// Vectors under way of a thread. Four of eight elements would need more registers than kResidentThreads have.
template <class T>
constexpr int kBatch = sizeof(T) == 2 ? 3 : 4;

template <class T, int kRowThreads>
__global__ void __launch_bounds__(kRowThreads, kResidentThreads / kRowThreads)
    sparsemax_fwd_kernel(RowMapParams p, int kept) {
  using A = Acc<T>;
  constexpr int kSize = Vec<T>::kSize;
  TSE_DYNAMIC_SHARED(Vec<T>, cache);  // each thread reads back only what it wrote
  TSE_SHARED(ThresholdSearch<A>, search, 1);
  const int64_t rows = row_count(p.rows);
  const T low = from_acc<T>(-infinity<A>());
  const auto max_of = [](A a, A b) { return larger(a, b); };
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    const T* const x = static_cast<const T*>(p.input) + row_offset(p.rows, row);
    T* const y = static_cast<T*>(p.output) + row_offset(p.output_rows, row);
    const RowParts<T> parts(x, p.rows.n);
    LiveVectors live((parts.vectors + kRowThreads - 1) / kRowThreads);

    Vec<T> batch[kBatch<T>];
    parts.load_batch(x, threadIdx.x, kRowThreads, low, batch);
    const int64_t loose_at = parts.loose(int(threadIdx.x));  // there are less than 16
    const A loose = loose_at >= 0 ? to_acc(x[loose_at]) : -infinity<A>();
    A max = larger(loose, -infinity<A>());
#pragma unroll
    for (int k = 0; k < kBatch<T> * kSize; ++k) max = larger(to_acc(batch[k / kSize].v[k % kSize]), max);
    max = row_reduce<kRowThreads>(max, max_of);
    const A bound = max < infinity<A>() ? add_down(max, A(-1)) : max - max;  // NaN: nothing is dead
    for (int i = 0, v = threadIdx.x; v < parts.vectors; i += kBatch<T>) {
#pragma unroll
      for (int j = 0; j < kBatch<T>; ++j, v += kRowThreads) {
        bool above = false;
#pragma unroll
        for (int k = 0; k < kSize; ++k) above |= !(to_acc(batch[j].v[k]) <= bound);
        if (v < kept && (above || live.shift != 0)) cache[v] = batch[j];
        if (!above || v >= parts.vectors) continue;
        live.add(i + j);
#pragma unroll
        for (int k = 0; k < kSize; ++k) max = larger(to_acc(batch[j].v[k]), max);
      }
      parts.load_batch(x, v, kRowThreads, low, batch);
    }
    const A m = reference_point(row_reduce<kRowThreads>(max, max_of));
    const auto load = [&](int v) { return v < kept ? cache[v] : load_vec(x + parts.first(v)); };

    Threshold<A> tau;
    if (threadIdx.x == 0) search[0] = {};
    for (bool goes_on = true; goes_on;) {
      SupportSum<A> own;
      const auto add = [&](A z) {
        const A above = tau.above(z - m);
        if (!(above <= 0)) own.add(above);
      };
      uint64_t above_bits = 0;
#pragma unroll 1
      for (uint64_t bits = live.bits; bits != 0; bits &= bits - 1) {
        const int bit = __ffsll(static_cast<long long>(bits)) - 1;
        const int64_t before = own.count();
#pragma unroll 1
        for (int i = bit << live.shift; i < (bit + 1) << live.shift; ++i) {
          const int v = threadIdx.x + i * kRowThreads;
          if (v >= parts.vectors) break;
          const Vec<T> e = load(v);
#pragma unroll
          for (int k = 0; k < kSize; ++k) add(to_acc(e.v[k]));
          own.join_part();
        }
        if (own.count() != before) above_bits |= uint64_t(1) << bit;
      }
      add(loose);
      const auto s = row_reduce<kRowThreads>(own.total(), [](const auto& a, const auto& b) { return join(a, b); });
      if (s.sum >= 1) live.bits = above_bits;  // what is below a lower bound of the threshold
      if (threadIdx.x == 0) search[0].step(s);
      __syncthreads();
      tau = search[0];
      goes_on = search[0].goes_on;
    }

    const bool aligned_alike = is_aligned_like(x, static_cast<const T*>(y));
    const Vec<T> dead = splat_vec(from_acc<T>(tau.t != tau.t ? tau.t : A(0)));
    for (int i = 0, v = threadIdx.x; v < parts.vectors; ++i, v += kRowThreads) {
      Vec<T> e = dead;
      if (live.has(i)) {
        e = load(v);
#pragma unroll
        for (int k = 0; k < kSize; ++k) e.v[k] = probability<T>(tau.above(to_acc(e.v[k]) - m));
      }
      parts.store(y, aligned_alike, v, e);
    }
    if (loose_at >= 0) y[loose_at] = probability<T>(tau.above(loose - m));
  }
}

// ---- neighbouring rows whose elements are not: a thread each ------------------------------------------------------

template <class T>
__global__ void __launch_bounds__(kSmallBlock) sparsemax_fwd_columns_kernel(RowMapParams p) {
  using A = Acc<T>;
  const int64_t rows = row_count(p.rows), n = p.rows.n, stride = p.rows.stride_n;
  for (int64_t row = first_row<1>(); row < rows; row += row_step<1>()) {
    const T* x = static_cast<const T*>(p.input) + row_offset(p.rows, row);
    T* y = static_cast<T*>(p.output) + row_offset(p.output_rows, row);
    A max = -infinity<A>();
    for (int64_t i = 0; i < n; ++i) max = larger(to_acc(x[i * stride]), max);
    const A m = reference_point(max);
    ThresholdSearch<A> tau;
    while (tau.goes_on) {
      SupportSum<A> s;
      for (int64_t i = 0; i < n; ++i) {
        const A above = tau.above(to_acc(x[i * stride]) - m);
        if (above <= 0) continue;
        s.add(above);
        s.join_part();
      }
      tau.step(s.total());
    }
    for (int64_t i = 0; i < n; ++i)
      y[i * p.output_rows.stride_n] = probability<T>(tau.above(to_acc(x[i * stride]) - m));
  }
}

template <class T, int kLanes, int kElements>
void launch_lanes(const RowMapParams& p, cudaStream_t stream) {
  launch("sparsemax_fwd_lanes_kernel", sparsemax_fwd_lanes_kernel<T, kLanes, kElements>,
         grid_for(row_count(p.rows), kRowsPerBlock<kLanes>), kSmallBlock, 0, stream, p);
}

template <class T, int kRowThreads>
void launch_block(const RowMapParams& p, int kept, cudaStream_t stream) {
  launch("sparsemax_fwd_kernel", sparsemax_fwd_kernel<T, kRowThreads>, grid_for(row_count(p.rows), 1), kRowThreads,
         kept * sizeof(Vec<T>), stream, p, kept);
}

template <class T>
void launch_fwd(const RowMapParams& p, cudaStream_t stream) {
  if (row_count(p.rows) == 0) return;
  const SparsemaxPlan plan = plan_sparsemax(device_limits(), p.rows.n, sizeof(T), sizeof(Vec<T>));
  if (p.rows.stride_n != 1 || p.output_rows.stride_n != 1 || plan.row_threads == 1)
    return launch("sparsemax_fwd_columns_kernel", sparsemax_fwd_columns_kernel<T>,
                  grid_for(row_count(p.rows), kSmallBlock), kSmallBlock, 0, stream, p);
  if (plan.row_threads == 4) launch_lanes<T, 4, 16>(p, stream);
  else if (plan.row_threads == 8) launch_lanes<T, 8, 32>(p, stream);
  else if (plan.elements == 16) launch_lanes<T, 32, 16>(p, stream);
  else if (plan.elements == 32) launch_lanes<T, 32, 32>(p, stream);
  else if (plan.row_threads == 128) launch_block<T, 128>(p, plan.kept, stream);
  else if (plan.row_threads == 512) launch_block<T, 512>(p, plan.kept, stream);
  else launch_block<T, 1024>(p, plan.kept, stream);
}

}  // namespace

void launch_sparsemax_fwd(const RowMapParams& p, cudaStream_t stream) { TSE_LAUNCH_BY_DTYPE(p, launch_fwd, p, stream) }

}  // namespace tse
