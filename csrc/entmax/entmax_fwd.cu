// Sparsemax forward on CUDA; entmax_cpu-inl.h tells the mathematics. [CUDA]
//
// Rows of up to 1024 elements stay in registers, of a warp or a quarter of one. Of a longer row, which a block has,
// every 16-byte vector is read once and compared with a lower bound of the threshold, known from the row's first
// vectors: the largest element minus 1. What lies below is dead: zeros are all that is left to do. What is alive is
// kept in shared memory as it was stored; Newton's steps and the result need nothing else. Vectors that do not fit
// there are read again, mostly a few, and from L2. So memory is passed once in each direction, and the result is exact
// for any n.
#include <climits>

#include "common/cuda/reduce.cuh"
#include "entmax/entmax.h"
#include "entmax/row_parts.cuh"
#include "entmax/sparsemax_plan.h"

namespace tse {
namespace {

// Rounded down: a threshold may include an element too many, not one too few.
__device__ inline float add_down(float a, float b) { return __fadd_rd(a, b); }
__device__ inline float add_down(float a, double b) { return __double2float_rd(double(a) + b); }
__device__ inline double add_down(double a, double b) { return __dadd_rd(a, b); }

template <class S, class N>
struct Support {
  S sum;    // Σ (x - tau)_+
  N count;  // #{x > tau}; NaN belongs to it, so that sum, tau and the whole row become NaN
  template <class A>
  __device__ void add(A above) {
    if (above <= 0) return;
    sum += above;
    ++count;
  }
  __device__ S step() const { return (sum - 1) / S(count > 1 ? count : 1); }  // count 0: a row of -inf alone
};
template <class S, class N>
__device__ inline Support<S, N> join(const Support<S, N>& a, const Support<S, N>& b) {
  return {a.sum + b.sum, a.count + b.count};
}

template <class A>
__device__ inline A larger(A a, A b) {
  return a > b ? a : b;
}
template <class A>
__device__ inline A reference_point(A max) {
  return max == -infinity<A>() ? A(0) : max;
}

template <class T, class A>
__device__ inline T probability(A above, A rest) {
  const A p = above - rest;
  return from_acc<T>(p <= 0 ? A(0) : p);
}

// ---- a row in registers -------------------------------------------------------------------------------------------

// Newton's steps from t over the lanes' elements; returns the last one, which is not in t. Rows that share a warp go on
// together: those that are done repeat their last step, which changes nothing.
template <int kLanes, int kCount, class A>
__device__ inline A newton(const A (&z)[kCount], A& t) {
  for (int support = INT_MAX;;) {
    Support<A, int> s = {0, 0};
#pragma unroll
    for (int k = 0; k < kCount; ++k) s.add(z[k] - t);
    s = warp_reduce<kLanes>(s, [](const auto& a, const auto& b) { return join(a, b); });
    const A step = s.step();
    const bool goes_on = s.count < support;
    if (!__any_sync(0xffffffffu, goes_on)) return step;
    if (!goes_on) continue;
    support = s.count;
    t = add_down(t, step);
  }
}

template <class T, int kLanes, int kElements>
__global__ void __launch_bounds__(kSmallBlock) sparsemax_fwd_lanes_kernel(EntmaxParams p) {
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
    A t = -1;
    newton<kLanes>(best, t);
    const A rest = newton<kLanes>(z, t);
    const bool aligned_alike = is_aligned_like(x, static_cast<const T*>(y));
#pragma unroll
    for (int j = 0; j < kVectors; ++j) {
#pragma unroll
      for (int k = 0; k < kSize; ++k) v[j].v[k] = probability<T>(z[j * kSize + k] - t, rest);
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
    sparsemax_fwd_kernel(EntmaxParams p, int kept) {
  using A = Acc<T>;
  constexpr int kSize = Vec<T>::kSize;
  TSE_DYNAMIC_SHARED(Vec<T>, cache);  // each thread reads back only what it wrote
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

    A t = -1, rest;
    for (int64_t support = INT64_MAX;;) {
      Support<A, int> own = {0, 0};
#pragma unroll 1
      for (uint64_t bits = live.bits; bits != 0; bits &= bits - 1) {
        const int bit = __ffsll(static_cast<long long>(bits)) - 1;
        const int before = own.count;
#pragma unroll 1
        for (int i = bit << live.shift; i < (bit + 1) << live.shift; ++i) {
          const int v = threadIdx.x + i * kRowThreads;
          if (v >= parts.vectors) break;
          const Vec<T> e = load(v);
#pragma unroll
          for (int k = 0; k < kSize; ++k) own.add((to_acc(e.v[k]) - m) - t);
        }
        if (own.count == before) live.bits &= ~(uint64_t(1) << bit);
      }
      own.add((loose - m) - t);
      const auto s = row_reduce<kRowThreads>(Support<double, int64_t>{double(own.sum), own.count},
                                             [](const auto& a, const auto& b) { return join(a, b); });
      const double step = s.step();
      rest = A(step);
      if (s.count >= support) break;
      support = s.count;
      t = add_down(t, step);
    }

    const bool aligned_alike = is_aligned_like(x, static_cast<const T*>(y));
    const Vec<T> dead = splat_vec(from_acc<T>(rest != rest ? rest : A(0)));
    for (int i = 0, v = threadIdx.x; v < parts.vectors; ++i, v += kRowThreads) {
      Vec<T> e = dead;
      if (live.has(i)) {
        e = load(v);
#pragma unroll
        for (int k = 0; k < kSize; ++k) e.v[k] = probability<T>((to_acc(e.v[k]) - m) - t, rest);
      }
      parts.store(y, aligned_alike, v, e);
    }
    if (loose_at >= 0) y[loose_at] = probability<T>((loose - m) - t, rest);
  }
}

// ---- neighbouring rows whose elements are not: a thread each ------------------------------------------------------

template <class T>
__global__ void __launch_bounds__(kSmallBlock) sparsemax_fwd_columns_kernel(EntmaxParams p) {
  using A = Acc<T>;
  const int64_t rows = row_count(p.rows), n = p.rows.n, stride = p.rows.stride_n;
  for (int64_t row = first_row<1>(); row < rows; row += row_step<1>()) {
    const T* x = static_cast<const T*>(p.input) + row_offset(p.rows, row);
    T* y = static_cast<T*>(p.output) + row_offset(p.output_rows, row);
    A max = -infinity<A>();
    for (int64_t i = 0; i < n; ++i) max = larger(to_acc(x[i * stride]), max);
    const A m = reference_point(max);
    A t = -1, rest;
    for (int64_t support = INT64_MAX;;) {
      Support<A, int64_t> s = {0, 0};
      for (int64_t i = 0; i < n; ++i) s.add((to_acc(x[i * stride]) - m) - t);
      rest = s.step();
      if (s.count >= support) break;
      support = s.count;
      t = add_down(t, rest);
    }
    for (int64_t i = 0; i < n; ++i)
      y[i * p.output_rows.stride_n] = probability<T>((to_acc(x[i * stride]) - m) - t, rest);
  }
}

template <class T, int kLanes, int kElements>
void launch_lanes(const EntmaxParams& p, cudaStream_t stream) {
  launch("sparsemax_fwd_lanes_kernel", sparsemax_fwd_lanes_kernel<T, kLanes, kElements>,
         grid_for(row_count(p.rows), kRowsPerBlock<kLanes>), kSmallBlock, 0, stream, p);
}

template <class T, int kRowThreads>
void launch_block(const EntmaxParams& p, int kept, cudaStream_t stream) {
  launch("sparsemax_fwd_kernel", sparsemax_fwd_kernel<T, kRowThreads>, grid_for(row_count(p.rows), 1), kRowThreads,
         kept * sizeof(Vec<T>), stream, p, kept);
}

template <class T>
void launch_fwd(const EntmaxParams& p, cudaStream_t stream) {
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

void launch_sparsemax_fwd(const EntmaxParams& p, cudaStream_t stream) { TSE_LAUNCH_BY_DTYPE(p, launch_fwd, p, stream) }

}  // namespace tse
