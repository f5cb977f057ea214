// Sparsemax backward on CUDA: g - mean of g over the support on the support, 0 elsewhere. [CUDA]
//
// The probabilities are read once by 16 bytes; of the incoming gradient only the vectors that have an element of the
// support, once, which are then kept, in registers or shared memory, until the mean is known; the result is written
// once. In rows that do not fit, those vectors behind what fits are read again.
#include "common/cuda/reduce.cuh"
#include "sparsemax/row_parts.cuh"
#include "sparsemax/sparsemax.h"
#include "sparsemax/sparsemax_plan.h"
#include "sparsemax/support.cuh"

namespace tse {
namespace {

// The elements of a vector that are in the support, a bit each; NaN belongs to it. Adds NaN to `nan` for a NaN.
template <class T, class A>
__device__ inline unsigned support_of(const Vec<T>& probabilities, A& nan) {
  unsigned bits = 0;
#pragma unroll
  for (int k = 0; k < Vec<T>::kSize; ++k) {
    const A p = to_acc(probabilities.v[k]);
    bits |= unsigned(!(p <= 0)) << k;
    nan += p - p;
  }
  return bits;
}

// add(g) of those in the support.
template <class T, class Add>
__device__ inline void add_support(const Vec<T>& g, unsigned support, const Add& add) {
#pragma unroll
  for (int k = 0; k < Vec<T>::kSize; ++k)
    if (support >> k & 1) add(to_acc(g.v[k]));
}

template <class T, class A>
__device__ inline Vec<T> gradient(const Vec<T>& g, unsigned support, A mean) {
  Vec<T> result;
#pragma unroll
  for (int k = 0; k < Vec<T>::kSize; ++k) result.v[k] = from_acc<T>(support >> k & 1 ? to_acc(g.v[k]) - mean : A(0));
  return result;
}

template <class T>
struct Row {
  const T* y;
  const T* g;
  T* out;
  __device__ Row(const RowMapParams& p, int64_t row)
      : y(static_cast<const T*>(p.output) + row_offset(p.output_rows, row)),
        g(static_cast<const T*>(p.grad_output) + row_offset(p.grad_output_rows, row)),
        out(static_cast<T*>(p.grad_input) + row_offset(p.grad_input_rows, row)) {}
};

template <class T, int kLanes, int kElements>
__global__ void __launch_bounds__(kSmallBlock) sparsemax_bwd_lanes_kernel(RowMapParams p) {
  using A = Acc<T>;
  constexpr int kSize = Vec<T>::kSize, kVectors = kElements / kSize;
  const int64_t rows = row_count(p.output_rows);
  const int lane = threadIdx.x % kLanes;
  const T zero = from_acc<T>(0);
  // The lanes of a warp stay together, with rows or without.
  for (int64_t first = int64_t(blockIdx.x) * kRowsPerBlock<kLanes>; first < rows; first += row_step<kLanes>()) {
    const int64_t index = first + threadIdx.x / kLanes;
    const Row<T> row(p, index < rows ? index : 0);
    const RowParts<T> parts(row.y, index < rows ? p.output_rows.n : 0);
    const bool g_alike = is_aligned_like(row.y, row.g);
    Vec<T> probabilities[kVectors], g[kVectors];
    unsigned support[kVectors] = {};
    SupportTotal<A> s = {0, 0};  // of grad_output; NaN where a probability is
#pragma unroll
    for (int j = 0; j < kVectors; ++j) probabilities[j] = parts.load_slot(row.y, true, lane + j * kLanes, zero);
#pragma unroll
    for (int j = 0; j < kVectors; ++j) {
      if (all_bits_zero(probabilities[j])) continue;
      g[j] = parts.load_slot(row.g, g_alike, lane + j * kLanes, zero);
      support[j] = support_of(probabilities[j], s.sum);
    }
#pragma unroll
    for (int j = 0; j < kVectors; ++j)
      if (support[j] != 0)
        add_support(g[j], support[j], [&](A v) {
          s.sum += v;
          ++s.count;
        });
    s = warp_reduce<kLanes>(s, [](const auto& a, const auto& b) { return join(a, b); });
    const A mean = s.sum / A(s.count);
    const bool out_alike = is_aligned_like(row.y, static_cast<const T*>(row.out));
#pragma unroll
    for (int j = 0; j < kVectors; ++j)
      parts.store_slot(row.out, out_alike, lane + j * kLanes,
                       support[j] == 0 ? splat_vec(zero) : gradient(g[j], support[j], mean));
  }
}

constexpr int kBatch = 2;  // vectors under way of a thread

// A vector of g, and which of its elements are in the support.
template <class T>
constexpr int64_t kKeptBytes = sizeof(Vec<T>) + 1;

template <class T, int kRowThreads>
__global__ void __launch_bounds__(kRowThreads, kResidentThreads / kRowThreads)
    sparsemax_bwd_kernel(RowMapParams p, int kept) {
  using A = Acc<T>;
  constexpr int kSize = Vec<T>::kSize;
  TSE_DYNAMIC_SHARED(Vec<T>, kept_g);  // each thread reads back only what it wrote
  unsigned char* const kept_support = reinterpret_cast<unsigned char*>(kept_g + kept);
  const int64_t rows = row_count(p.output_rows);
  const T zero = from_acc<T>(0);
  for (int64_t index = blockIdx.x; index < rows; index += gridDim.x) {
    const Row<T> row(p, index);
    const RowParts<T> parts(row.y, p.output_rows.n);
    const bool g_alike = is_aligned_like(row.y, row.g);
    LiveVectors live((parts.vectors + kRowThreads - 1) / kRowThreads);
    SupportSum<A> own;
    A nan = 0;
    for (int i = 0, v = threadIdx.x; v < parts.vectors; i += kBatch, v += kBatch * kRowThreads) {
      Vec<T> probabilities[kBatch], g[kBatch];
      unsigned support[kBatch] = {};
      parts.load_batch(row.y, v, kRowThreads, zero, probabilities);
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        if (all_bits_zero(probabilities[j])) continue;
        g[j] = parts.load(row.g, g_alike, v + j * kRowThreads);
        support[j] = support_of(probabilities[j], nan);
      }
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        const int at = v + j * kRowThreads;
        if (at < kept && (support[j] != 0 || live.shift != 0))
          kept_support[at] = static_cast<unsigned char>(support[j]);
        if (support[j] == 0) continue;
        if (at < kept) kept_g[at] = g[j];
        live.add(i + j);
        add_support(g[j], support[j], [&](A v) { own.add(v); });
        own.join_part();
      }
    }
    const int64_t loose_at = parts.loose(int(threadIdx.x));  // there are less than 16
    const A loose = loose_at >= 0 ? to_acc(row.y[loose_at]) : A(0);
    const A loose_g = loose <= 0 ? A(0) : to_acc(row.g[loose_at]);
    if (!(loose <= 0)) own.add(loose_g + (loose - loose));
    const auto s = row_reduce<kRowThreads>(join(own.total(), {double(nan), 0}),
                                           [](const auto& a, const auto& b) { return join(a, b); });
    const A mean = A(s.sum / double(s.count));
    const bool out_alike = is_aligned_like(row.y, static_cast<const T*>(row.out));
    for (int i = 0, v = threadIdx.x; v < parts.vectors; ++i, v += kRowThreads) {
      Vec<T> result = splat_vec(zero);
      if (live.has(i)) {
        const unsigned support = v < kept ? kept_support[v] : support_of(load_vec(row.y + parts.first(v)), nan);
        if (support != 0) result = gradient(v < kept ? kept_g[v] : parts.load(row.g, g_alike, v), support, mean);
      }
      parts.store(row.out, out_alike, v, result);
    }
    if (loose_at >= 0) row.out[loose_at] = from_acc<T>(loose <= 0 ? A(0) : loose_g - mean);
  }
}

// Neighbouring rows whose elements are not: a thread each.
template <class T>
__global__ void __launch_bounds__(kSmallBlock) sparsemax_bwd_columns_kernel(RowMapParams p) {
  using A = Acc<T>;
  const int64_t rows = row_count(p.output_rows), n = p.output_rows.n;
  const int64_t y_stride = p.output_rows.stride_n, g_stride = p.grad_output_rows.stride_n;
  for (int64_t index = first_row<1>(); index < rows; index += row_step<1>()) {
    const Row<T> row(p, index);
    SupportSum<A> own;
    for (int64_t i = 0; i < n; ++i) {
      const A probability = to_acc(row.y[i * y_stride]);
      if (probability <= 0) continue;
      own.add(to_acc(row.g[i * g_stride]) + (probability - probability));
      own.join_part();
    }
    const SupportTotal<double> s = own.total();
    const A mean = A(s.sum / double(s.count));
    for (int64_t i = 0; i < n; ++i)
      row.out[i * p.grad_input_rows.stride_n] =
          from_acc<T>(to_acc(row.y[i * y_stride]) <= 0 ? A(0) : to_acc(row.g[i * g_stride]) - mean);
  }
}

template <class T, int kLanes, int kElements>
void launch_lanes(const RowMapParams& p, cudaStream_t stream) {
  launch("sparsemax_bwd_lanes_kernel", sparsemax_bwd_lanes_kernel<T, kLanes, kElements>,
         grid_for(row_count(p.output_rows), kRowsPerBlock<kLanes>), kSmallBlock, 0, stream, p);
}

template <class T, int kRowThreads>
void launch_block(const RowMapParams& p, int kept, cudaStream_t stream) {
  launch("sparsemax_bwd_kernel", sparsemax_bwd_kernel<T, kRowThreads>, grid_for(row_count(p.output_rows), 1),
         kRowThreads, kept * kKeptBytes<T>, stream, p, kept);
}

template <class T>
void launch_bwd(const RowMapParams& p, cudaStream_t stream) {
  if (row_count(p.output_rows) == 0) return;
  const SparsemaxPlan plan = plan_sparsemax(device_limits(), p.output_rows.n, sizeof(T), kKeptBytes<T>);
  if (p.output_rows.stride_n != 1 || p.grad_input_rows.stride_n != 1 || plan.row_threads == 1)
    return launch("sparsemax_bwd_columns_kernel", sparsemax_bwd_columns_kernel<T>,
                  grid_for(row_count(p.output_rows), kSmallBlock), kSmallBlock, 0, stream, p);
  if (plan.row_threads == 4) launch_lanes<T, 4, 16>(p, stream);
  else if (plan.row_threads == 8) launch_lanes<T, 8, 32>(p, stream);
  else if (plan.elements == 16) launch_lanes<T, 32, 16>(p, stream);
  else if (plan.elements == 32) launch_lanes<T, 32, 32>(p, stream);
  else if (plan.row_threads == 128) launch_block<T, 128>(p, plan.kept, stream);
  else if (plan.row_threads == 512) launch_block<T, 512>(p, plan.kept, stream);
  else launch_block<T, 1024>(p, plan.kept, stream);
}

}  // namespace

void launch_sparsemax_bwd(const RowMapParams& p, cudaStream_t stream) { TSE_LAUNCH_BY_DTYPE(p, launch_bwd, p, stream) }

}  // namespace tse
