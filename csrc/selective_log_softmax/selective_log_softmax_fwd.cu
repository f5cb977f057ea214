// Log-probabilities at given classes and entropy, forward on CUDA. [CUDA]
//
// Each logit is read once: every thread keeps the sums of its part, with a reference that begins as the own class'
// logit. The own class is the one that index names first; if index names another one that has more than half of the
// probability, the row is summed once more without that, so that its log-probability has all its digits.
#include "common/cuda/compensated.cuh"
#include "common/cuda/kept_row.cuh"
#include "common/cuda/reduce.cuh"
#include "selective_log_softmax/exponent.cuh"

namespace tse {
namespace {

// sum = Σ 2^t, linear = Σ 2^t t with t = (z - m) · exponent_scale of the logits added. m is the largest of them and of
// the own class, so that of one possible class linear is 0, and elsewhere nothing cancels; without kEntropy, too, so
// that the sum has the same bits.
template <class A, bool kEntropy>
struct EntropySum : Reference<A> {
  Compensated<A> sum, linear;

  __device__ void raise_reference(A to, const Exponent<A>& exponent) {
    if (!this->is_none()) {
      const A t = exponent(this->m(), to * A(0.5)), factor = exp2_of(t);
      if constexpr (kEntropy) {
        linear.add(sum.value() * t);
        linear.scale(factor);
      }
      sum.scale(factor);
    }
    this->set(to, A(0));
  }
};

template <class A, bool kEntropy>
__device__ inline EntropySum<A, kEntropy> join(EntropySum<A, kEntropy> a, EntropySum<A, kEntropy> b,
                                               const Exponent<A>& exponent) {
  const A m = a.m() > b.m() ? a.m() : b.m();
  if (a.m() < m) a.raise_reference(m, exponent);
  if (b.m() < m) b.raise_reference(m, exponent);
  a.sum.add(b.sum);
  if constexpr (kEntropy) a.linear.add(b.linear);
  return a;
}

// Adds kCount logits but for number `own`: one exp2 each.
template <int kCount, bool kEntropy, class T, class A>
__device__ inline void add(EntropySum<A, kEntropy>& s, const T* x, int own, const Exponent<A>& exponent) {
  A z[kCount];
#pragma unroll
  for (int k = 0; k < kCount; ++k) z[k] = exponent.cap(to_acc(x[k]));
  prepare(s, z, own, exponent);
  A sum = 0, linear = 0;
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
    A t = exponent.exponent(z[k], s.half);
    if (kEntropy) t = exponent.bounded_below(t);
    const A term = exp2_of(t);
    sum = k == 0 ? term : sum + term;
    if (kEntropy) linear = fma(term, t, linear);
  }
  s.sum.add(sum);
  if (kEntropy) s.linear.add(linear);
}

// A row's sums without its own class, and their total.
template <class A, bool kEntropy>
struct RowSums : EntropySum<A, kEntropy> {
  A own_t, own_term, others, total;
};

template <class T>
constexpr int kGroup = std::is_same_v<T, double> ? 8 : 16;  // elements of a strided row under way together

// By all threads of the row.
template <class T, int kRowThreads, bool kEntropy>
__device__ inline RowSums<Acc<T>, kEntropy> sum_row(const SelectiveLogSoftmaxParams& p, const T* x, int64_t own,
                                                    const Exponent<Acc<T>>& exponent) {
  using A = Acc<T>;
  using Index = std::conditional_t<kRowThreads == 1, int64_t, int>;  // kLongestKeptRow
  const int64_t n = p.rows.n, stride = p.rows.stride_n;
  EntropySum<A, kEntropy> s;
  const A z_own = own < 0 ? A(0) : exponent.cap(to_acc(x[own * stride]));
  if (own >= 0) s.set(z_own, A(0));
  const auto add_at = [&](int64_t i, const T* v, auto count) {
    constexpr int kCount = decltype(count)::value;
    const Index at = Index(own) - Index(i);
    add<kCount>(s, v, at >= 0 && at < kCount ? int(at) : -1, exponent);
  };
  const auto scalar = [&](int64_t i, T v) { add_at(i, &v, std::integral_constant<int, 1>{}); };
  if constexpr (kRowThreads == 1) {
    int64_t i = 0;
    for (; i + kGroup<T> <= n; i += kGroup<T>) {
      T group[kGroup<T>];
#pragma unroll
      for (int k = 0; k < kGroup<T>; ++k) group[k] = x[(i + k) * stride];
      add_at(i, group, std::integral_constant<int, kGroup<T>>{});
    }
    for (; i < n; ++i) scalar(i, x[i * stride]);
  } else {
    KeptRow<kRowThreads, T, 2>(x, n, stride)
        .read(
            false, [&](int64_t i, const Vec<T>& v) { add_at(i, v.v, std::integral_constant<int, Vec<T>::kSize>{}); },
            scalar);
  }
  RowSums<A, kEntropy> r = {
      row_reduce<kRowThreads>(s, [&](const auto& a, const auto& b) { return join(a, b, exponent); })};
  r.own_t = own < 0 ? A(0) : exponent(z_own, r.half);
  r.own_term = own < 0 ? A(0) : exp2_of(r.own_t);
  r.others = r.sum.value();
  r.total = r.others + r.own_term;
  return r;
}

template <class T, int kRowThreads, bool kEntropy>
__global__ void __launch_bounds__(kBlockThreads<kRowThreads>, kBlocksAtLeast<T, kRowThreads>)
    selective_log_softmax_fwd_kernel(SelectiveLogSoftmaxParams p) {
  using A = Acc<T>;
  const Exponent<A> exponent(p.transform);
  const int64_t rows = row_count(p.rows);
  const int lane = threadIdx.x % kRowThreads;
  for (int64_t row = first_row<kRowThreads>(); row < rows; row += row_step<kRowThreads>()) {
    const T* x = static_cast<const T*>(p.input) + row_offset(p.rows, row);
    const auto z_of = [&](int64_t c) { return exponent.cap(to_acc(x[c * p.rows.stride_n])); };
    RowSums<A, kEntropy> s;
    int64_t own = p.k > 0 ? asked_class(p, row, 0) : -1;
    for (int pass = 0;; ++pass) {
      s = sum_row<T, kRowThreads, kEntropy>(p, x, own, exponent);
      if (pass == 1 || p.k <= 1 || 2 * s.own_term > s.total) break;
      int64_t most = -1;
      for (int64_t k = lane; k < p.k; k += kRowThreads) {
        const int64_t c = asked_class(p, row, k);
        if (c != own && 2 * exponent.term(z_of(c), s.half) > s.total) most = c;
      }
      most = row_reduce<kRowThreads>(most, [](int64_t a, int64_t b) { return a > b ? a : b; });
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
    const A mean = (s.linear.value() + s.own_term * s.own_t) / s.total;
    static_cast<A*>(p.entropy)[row] = (s.own_term == 1 ? A(log1p(s.others)) : log_total) - mean * kLn2<A>;
    static_cast<A*>(p.row_mean)[row] = mean;
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
  if (p.rows.stride_n != 1 || p.rows.n > kLongestKeptRow) launch_rows<T, 1>(p, stream);
  else if (p.rows.n <= 1024) launch_rows<T, 32>(p, stream);
  else if (p.rows.n <= 8192) launch_rows<T, 128>(p, stream);
  else launch_rows<T, 512>(p, stream);
}

}  // namespace

void launch_selective_log_softmax_fwd(const SelectiveLogSoftmaxParams& p, cudaStream_t stream) {
  TSE_LAUNCH_BY_DTYPE(p, launch_fwd, p, stream)
}

}  // namespace tse
