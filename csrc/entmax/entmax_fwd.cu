// Sparsemax forward on CUDA. [CUDA]
//
// The row is read once into shared memory where it fits; then Newton's steps for the threshold (entmax_cpu-inl.h tells
// the mathematics), each one reduction of (sum, count), until the support stops changing; then it is written once.
// Rows that do not fit are read again in each step, from L2 as far as it reaches.
#include "common/cuda/reduce.cuh"
#include "entmax/entmax.h"

namespace tse {
namespace {

constexpr size_t kSharedBytes = 47 * 1024;  // of the 48 that a block has without asking; reductions have the rest

template <class A>
struct RowMax {
  A max;
  int has_nan;
};

struct Support {
  double sum;      // Σ (x - tau)_+
  int64_t count;   // #{x > tau}
};

template <class T, int kRowThreads, bool kOnChip>
__global__ void __launch_bounds__(kBlockThreads<kRowThreads>) sparsemax_fwd_kernel(EntmaxParams p) {
  using A = Acc<T>;
  TSE_DYNAMIC_SHARED(A, shared);
  const T* input = static_cast<const T*>(p.input);
  const int64_t rows = row_count(p.rows), n = p.rows.n, stride = p.rows.stride_n;
  const int lane = threadIdx.x % kRowThreads;
  A* cache = shared + (kOnChip ? threadIdx.x / kRowThreads * n : 0);  // each thread reads back only what it wrote

  for (int64_t row = first_row<kRowThreads>(); row < rows; row += row_step<kRowThreads>()) {
    const T* x = input + row_offset(p.rows, row);
    T* y = static_cast<T*>(p.output) + row_offset(p.output_rows, row);
    const auto element = [&](int64_t i) { return kOnChip ? cache[i] : A(to_acc(x[i * stride])); };

    RowMax<A> r = {-infinity<A>(), 0};
    for (int64_t i = lane; i < n; i += kRowThreads) {
      const A v = to_acc(x[i * stride]);
      if (kOnChip) cache[i] = v;
      r.max = v > r.max ? v : r.max;
      r.has_nan |= v != v;
    }
    r = row_reduce<kRowThreads>(
        r, [](RowMax<A> a, RowMax<A> b) { return RowMax<A>{a.max > b.max ? a.max : b.max, a.has_nan | b.has_nan}; });
    if (r.has_nan || !(r.max < infinity<A>()) || r.max == -infinity<A>()) {  // the same in every thread of the row
      const A fill = r.has_nan || r.max == infinity<A>() ? infinity<A>() - infinity<A>() : A(0);
      for (int64_t i = lane; i < n; i += kRowThreads) y[i * p.output_rows.stride_n] = from_acc<T>(fill);
      continue;
    }

    double tau = -1;
    for (int64_t support = n + 1;;) {
      const A hi = A(tau), lo = A(tau - double(hi));
      A sum = 0;
      Support s = {0, 0};
      for (int64_t i = lane; i < n; i += kRowThreads) {
        const A probability = ((element(i) - r.max) - hi) - lo;
        if (probability > 0) {
          sum += probability;
          ++s.count;
        }
      }
      s.sum = sum;
      s = row_reduce<kRowThreads>(s, [](Support a, Support b) { return Support{a.sum + b.sum, a.count + b.count}; });
      tau += (s.sum - 1) / double(s.count);
      if (s.count >= support) break;
      support = s.count;
    }
    const A hi = A(tau), lo = A(tau - double(hi));
    for (int64_t i = lane; i < n; i += kRowThreads) {
      const A probability = ((element(i) - r.max) - hi) - lo;
      y[i * p.output_rows.stride_n] = from_acc<T>(probability > 0 ? probability : A(0));
    }
  }
}

template <class T, int kRowThreads, bool kOnChip>
void launch_rows(const EntmaxParams& p, cudaStream_t stream) {
  const size_t bytes = kOnChip ? kRowsPerBlock<kRowThreads> * p.rows.n * sizeof(Acc<T>) : 0;
  launch("sparsemax_fwd_kernel", sparsemax_fwd_kernel<T, kRowThreads, kOnChip>,
         grid_for(row_count(p.rows), kRowsPerBlock<kRowThreads>), kBlockThreads<kRowThreads>, bytes, stream, p);
}

template <class T>
void launch_fwd(const EntmaxParams& p, cudaStream_t stream) {
  if (row_count(p.rows) == 0) return;
  const size_t row_bytes = p.rows.n * sizeof(Acc<T>);
  if (p.rows.stride_n != 1) launch_rows<T, 1, false>(p, stream);
  else if (p.rows.n <= 1024) launch_rows<T, 32, true>(p, stream);
  else if (row_bytes <= kSharedBytes) launch_rows<T, 256, true>(p, stream);
  else launch_rows<T, 512, false>(p, stream);
}

}  // namespace

void launch_sparsemax_fwd(const EntmaxParams& p, cudaStream_t stream) { TSE_LAUNCH_BY_DTYPE(p, launch_fwd, p, stream) }

}  // namespace tse
