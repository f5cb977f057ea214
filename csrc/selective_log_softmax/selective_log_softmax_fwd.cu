// Log-probabilities at given classes and entropy, forward on CUDA. [CUDA]
//
// Each logit is read once: every thread keeps the sums of its part. The own class is the one that index names first; if
// index names another one that has more than half of the probability, the row is summed once more without that, so that
// its log-probability has all its digits.
#include "common/cuda/row.cuh"
#include "selective_log_softmax/exponent.cuh"

namespace tse {
namespace {

// sum = Σ 2^t, linear = Σ 2^t t with t = (z - m) · exponent_scale of the logits added.
template <class A, bool kEntropy>
struct Sums {
  Compensated<A> sum, linear;
  __device__ void add(const Sums& other) {
    sum.add(other.sum);
    if constexpr (kEntropy) linear.add(other.linear);
  }
};

// m is the largest of the logits and of the own class, so that of one possible class linear is 0, and elsewhere nothing
// cancels; without kEntropy, too, so that the sum has the same bits.
template <class A, bool kEntropy>
struct EntropySum : Reference<A> {
  Sums<A, kEntropy> sums;

  __device__ void raise_reference(A to, const Exponent<A>& exponent) {
    if (!this->is_none()) {
      const A t = exponent(this->m(), to * A(0.5)), factor = exp2_of(t);
      if constexpr (kEntropy) {
        sums.linear.add(sums.sum.value() * t);
        sums.linear.scale(factor);
      }
      sums.sum.scale(factor);
    }
    this->set(to, A(0));
  }
};

// Adds kCount logits but for number `own`: one exp2 each.
template <int kCount, bool kEntropy, class T, class A>
__device__ inline void add(EntropySum<A, kEntropy>& s, const T* x, int own, const Exponent<A>& exponent) {
  A z[kCount];
#pragma unroll
  for (int k = 0; k < kCount; ++k) z[k] = exponent.cap(to_acc(x[k]));
  prepare(s, z, max_of(z), own, exponent);
  A sum = 0, linear = 0;
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
    A t = exponent.exponent(z[k], s.half);
    if (kEntropy) t = exponent.bounded_below(t);
    const A term = exp2_of(t);
    sum = k == 0 ? term : sum + term;
    if (kEntropy) linear = fma(term, t, linear);
  }
  s.sums.sum.add(sum);
  if (kEntropy) s.sums.linear.add(linear);
}

// A row's sums without its own class, and their total.
template <class A, bool kEntropy>
struct RowSums : EntropySum<A, kEntropy> {
  A own_t, own_term, others, total;
};

// By all threads of the row.
template <class T, int kRowThreads, bool kEntropy>
__device__ inline RowSums<Acc<T>, kEntropy> sum_row(const SelectiveLogSoftmaxParams& p, const T* x, int64_t own,
                                                    int& turn, const Exponent<Acc<T>>& exponent) {
  using A = Acc<T>;
  using Index = std::conditional_t<kRowThreads == 1, int64_t, int>;  // kLongestRow
  const int64_t n = p.rows.n, stride = p.rows.stride_n;
  EntropySum<A, kEntropy> s;
  const auto add_at = [&](int64_t i, const T* v, auto count) {
    constexpr int kCount = decltype(count)::value;
    const Index at = Index(own) - Index(i);
    add<kCount>(s, v, at >= 0 && at < kCount ? int(at) : -1, exponent);
  };
  KeptRow<kRowThreads, T, 2>({x, stride}, n)
      .read(
          false, [&](int64_t i, const Vec<T>& v) { add_at(i, v.v, std::integral_constant<int, Vec<T>::kSize>{}); },
          [&](int64_t i, T v) { add_at(i, &v, std::integral_constant<int, 1>{}); });
  const A z_own = own < 0 ? A(0) : exponent.cap(to_acc(x[own * stride]));
  RowSums<A, kEntropy> r = {sum_of_threads<kRowThreads>(s, turn, exponent)};
  if (own >= 0 && z_own > r.limit) r.raise_reference(z_own, exponent);
  r.own_t = own < 0 ? A(0) : exponent(z_own, r.half);
  r.own_term = own < 0 ? A(0) : exp2_of(r.own_t);
  r.others = r.sums.sum.value();
  r.total = r.others + r.own_term;
  return r;
}

template <class T, int kRowThreads, bool kEntropy>
__global__ void __launch_bounds__(kBlockThreads<kRowThreads>, kBlocksAtLeast<T, kRowThreads>)
    selective_log_softmax_fwd_kernel(SelectiveLogSoftmaxParams p, Exponent<Acc<T>> exponent) {
  using A = Acc<T>;
  int turn = 0;
  const int64_t rows = row_count(p.rows);
  const int lane = threadIdx.x % kRowThreads;
  for (int64_t row = first_row<kRowThreads>(); row < rows; row += row_step<kRowThreads>()) {
    const T* x = static_cast<const T*>(p.input) + row_offset(p.rows, row);
    const auto z_of = [&](int64_t c) { return exponent.cap(to_acc(x[c * p.rows.stride_n])); };
    RowSums<A, kEntropy> s;
    int64_t own = p.k > 0 ? asked_class(p, row, 0) : -1;
    for (int pass = 0;; ++pass) {
      s = sum_row<T, kRowThreads, kEntropy>(p, x, own, turn, exponent);
      if (pass == 1 || p.k <= 1 || 2 * s.own_term > s.total) break;
      int64_t most = -1;
      for (int64_t k = lane; k < p.k; k += kRowThreads) {
        const int64_t c = asked_class(p, row, k);
        if (c != own && 2 * exponent.term(z_of(c), s.half) > s.total) most = c;
      }
      most = row_reduce<kRowThreads>(most, turn, [](int64_t a, int64_t b) { return a > b ? a : b; });
      if (most < 0) break;
      own = most;
    }
    const A log_total = log(s.total);
    for (int64_t k = lane; k < p.k; k += kRowThreads) {
      const int64_t c = asked_class(p, row, k);
      const A below = exponent.below(z_of(c), s.half);
      static_cast<A*>(p.logp)[row * p.k + k] =
          0 - (c == own ? negative_log(s.own_term, s.others, s.total, below) : log_total + below);
    }
    if (lane != 0) continue;
    static_cast<A*>(p.row_m)[row] = s.m();
    static_cast<A*>(p.row_sum)[row] = s.total;
    static_cast<A*>(p.row_others)[row] = s.others;
    if constexpr (!kEntropy) continue;
    const A mean = (s.sums.linear.value() + s.own_term * s.own_t) / s.total;
    static_cast<A*>(p.entropy)[row] = (s.own_term == 1 ? A(log1p(s.others)) : log_total) - mean * kLn2<A>;
    static_cast<A*>(p.row_mean)[row] = mean;
  }
}

template <class T, bool kEntropy>
void launch_rows(const SelectiveLogSoftmaxParams& p, cudaStream_t stream) {
  with_plan<T, false, false>(p.rows.n, p.rows.stride_n == 1, [&](auto plan) {
    constexpr int kRowThreads = decltype(plan)::kThreads, kThreads = kBlockThreads<kRowThreads>;
    const auto kernel = selective_log_softmax_fwd_kernel<T, kRowThreads, kEntropy>;
    launch("selective_log_softmax_fwd_kernel", kernel,
           grid_for(row_count(p.rows), kRowsPerBlock<kRowThreads>, kernel, kThreads, 0), kThreads, 0, stream, p,
           Exponent<Acc<T>>(p.transform));
  });
}

template <class T>
void launch_fwd(const SelectiveLogSoftmaxParams& p, cudaStream_t stream) {
  if (row_count(p.rows) == 0) return;
  if (p.entropy != nullptr) launch_rows<T, true>(p, stream);
  else launch_rows<T, false>(p, stream);
}

}  // namespace

void launch_selective_log_softmax_fwd(const SelectiveLogSoftmaxParams& p, cudaStream_t stream) {
  TSE_BY_DTYPE(p.dtype, launch_fwd, p, stream)
}

}  // namespace tse
