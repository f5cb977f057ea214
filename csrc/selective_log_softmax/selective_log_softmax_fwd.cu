// Log-probabilities at given classes and entropy, forward on CUDA. [CUDA]
//
// Each logit is read once: every thread keeps the sums of its part (selective_log_softmax_cpu-inl.h tells which) with a
// running reference point, an integer, so that sums are joined by powers of two.
#include "common/cuda/reduce.cuh"
#include "selective_log_softmax/exponent.cuh"

namespace tse {
namespace {

// With t = s · log2(e) - m: sum = Σ 2^t, largest = t of the largest logit, linear = Σ 2^t (t - largest).
// m = -inf: nothing but -inf was added, or NaN, which sum then shows.
template <class A>
struct EntropySum {
  A m = -infinity<A>();
  A sum = 0;
  A largest = 0;
  A linear = 0;
};

// s against the reference point `m` and the exponent `largest` there, of a logit that is not smaller.
template <class A>
__device__ inline EntropySum<A> moved(const EntropySum<A>& s, A m, A largest) {
  if (s.m == m && s.largest == largest) return s;
  const bool empty = s.sum == 0;
  const A down = s.m - m, scale = s.m == m ? A(1) : exp2_of(down);
  EntropySum<A> r;
  r.m = m;
  r.largest = largest;
  r.sum = empty ? A(0) : s.sum * scale;
  r.linear = empty ? A(0) : (s.linear + s.sum * ((s.largest - largest) + (s.m == m ? A(0) : down))) * scale;
  return r;
}

template <class A>
__device__ inline EntropySum<A> join(const EntropySum<A>& a, const EntropySum<A>& b) {
  const bool a_first = a.m > b.m || (a.m == b.m && a.largest >= b.largest);  // the same pair in both lanes
  const EntropySum<A> top = a_first ? a : b, low = moved(a_first ? b : a, top.m, top.largest);
  return {top.m, top.sum + low.sum, top.largest, top.linear + low.linear};
}

// Adds count logits: one exp2 each, and one for the scaling.
template <int kCount, bool kEntropy, class T, class A>
__device__ inline void add(EntropySum<A>& s, const T* x, const Exponent<A>& exponent) {
  A v[kCount], max = -infinity<A>();
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
    v[k] = exponent.cap(to_acc(x[k]));
    max = v[k] > max ? v[k] : max;
  }
  const A m = ceil(max * exponent.scale);
  if (m > s.m) {
    s = moved(s, m, kEntropy ? exponent(max, m) : A(0));
  } else if (kEntropy && s.m != -infinity<A>()) {
    const A t = exponent(max, s.m);
    if (t > s.largest) s = moved(s, s.m, t);
  }
  const A reference = s.m == -infinity<A>() ? A(0) : s.m;
  A sum = 0, linear = 0;
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
    const A t = exponent(v[k], reference), term = exp2_of(t);
    sum += term;
    if (kEntropy) linear += term * (t - s.largest);
  }
  s.sum += sum;
  s.linear += linear;
}

// log p of a class with logit x. One that has nearly all of the probability is compared with the sum in the sum's own
// arithmetic, so that a log-probability that must be 0 is 0.
template <class A>
__device__ inline A log_probability(const EntropySum<A>& s, A x, const Exponent<A>& exponent) {
  if (x == -infinity<A>() && !exponent.capped) return s.sum > 0 ? -infinity<A>() : infinity<A>() - infinity<A>();
  const A capped = exponent.cap(x), t = fma(capped, exponent.scale, -s.m), term = exp2_of(t);
  const A l = term > s.sum * A(0.25) ? A(log2(term / s.sum)) : t - A(log2(s.sum));
  return l > 0 ? A(0) : l * kLn2<A>;
}

constexpr int kGroup = 16;

template <class T, int kRowThreads, bool kEntropy>
__global__ void __launch_bounds__(kBlockThreads<kRowThreads>)
    selective_log_softmax_fwd_kernel(SelectiveLogSoftmaxParams p) {
  using A = Acc<T>;
  const Exponent<A> exponent(p.transform);
  const int64_t rows = row_count(p.rows), n = p.rows.n;
  const int lane = threadIdx.x % kRowThreads;
  for (int64_t row = first_row<kRowThreads>(); row < rows; row += row_step<kRowThreads>()) {
    const T* x = static_cast<const T*>(p.input) + row_offset(p.rows, row);
    EntropySum<A> s;
    int64_t done = 0;
    if constexpr (kRowThreads == 1) {  // groups of 16 bound the rounding of a sum over the whole row
      for (; done + kGroup <= n; done += kGroup) {
        T group[kGroup];
#pragma unroll
        for (int k = 0; k < kGroup; ++k) group[k] = x[(done + k) * p.rows.stride_n];
        add<kGroup, kEntropy>(s, group, exponent);
      }
    }
    const auto scalar = [&](int64_t, T v) { add<1, kEntropy>(s, &v, exponent); };
    const auto vector = [&](int64_t, const Vec<T>& v) { add<Vec<T>::kSize, kEntropy>(s, v.v, exponent); };
    for_each_in_row<kRowThreads>(x + done * p.rows.stride_n, n - done, p.rows.stride_n, vector, scalar);
    s = row_reduce<kRowThreads>(s, [](const EntropySum<A>& a, const EntropySum<A>& b) { return join(a, b); });
    for (int64_t k = lane; k < p.k; k += kRowThreads) {
      const int64_t c = index_of(p, row, k);
      device_assert(c >= 0 && c < n, "selective_log_softmax: index: expected a class in [0, C)");
      static_cast<A*>(p.logp)[row * p.k + k] = log_probability(s, A(to_acc(x[c * p.rows.stride_n])), exponent);
    }
    if (lane != 0) continue;
    static_cast<A*>(p.row_m)[row] = s.m;
    static_cast<A*>(p.row_sum)[row] = s.sum;
    if (!kEntropy) continue;
    const A mean = s.linear / s.sum;
    static_cast<A*>(p.entropy)[row] = (A(log2(s.sum / exp2_of(s.largest))) - mean) * kLn2<A>;
    static_cast<A*>(p.row_mean)[row] = s.largest + mean;
  }
}

template <class T, int kRowThreads, bool kEntropy>
void launch_kernel(const SelectiveLogSoftmaxParams& p, cudaStream_t stream) {
  launch("selective_log_softmax_fwd_kernel", selective_log_softmax_fwd_kernel<T, kRowThreads, kEntropy>,
         grid_for(row_count(p.rows), kRowsPerBlock<kRowThreads>), kBlockThreads<kRowThreads>, 0, stream, p);
}

template <class T, int kRowThreads>
void launch_rows(const SelectiveLogSoftmaxParams& p, cudaStream_t stream) {
  if (p.entropy != nullptr) launch_kernel<T, kRowThreads, true>(p, stream);
  else launch_kernel<T, kRowThreads, false>(p, stream);
}

template <class T>
void launch_fwd(const SelectiveLogSoftmaxParams& p, cudaStream_t stream) {
  if (row_count(p.rows) == 0) return;
  if (p.rows.stride_n != 1) launch_rows<T, 1>(p, stream);
  else if (p.rows.n <= 1024) launch_rows<T, 32>(p, stream);
  else if (p.rows.n <= 8192) launch_rows<T, 128>(p, stream);
  else launch_rows<T, 512>(p, stream);
}

}  // namespace

void launch_selective_log_softmax_fwd(const SelectiveLogSoftmaxParams& p, cudaStream_t stream) {
  TSE_LAUNCH_BY_DTYPE(p, launch_fwd, p, stream)
}

}  // namespace tse
