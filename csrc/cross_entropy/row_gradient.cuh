// The own class and the gradient of a row, for backward and for a forward that knows grad_output. [CUDA]
#pragma once
#include "common/cuda/kept_row.cuh"
#include "common/cuda/logits.cuh"
#include "common/cuda/reduce.cuh"
#include "cross_entropy/coefficients.cuh"
#include "cross_entropy/cross_entropy.h"

namespace tse {

// The own class of a row (cross_entropy.h). index -1: none.
template <class T, int kRowThreads>
struct OwnClass {
  using Index = std::conditional_t<kRowThreads == 1, int64_t, int>;  // kLongestKeptRow
  Index index;
  Acc<T> logit;   // not capped; the gradient may take its place
  Acc<T> weight;  // what the target gives it
};

// The class that has more than half of the probability.
template <class T, int kRowThreads>
__device__ inline int64_t class_of_most(const CrossEntropyParams& p, int64_t row) {
  const T* q = static_cast<const T*>(p.probabilities) + row_offset(p.probabilities_rows, row);
  int64_t own = -1;
  const auto scalar = [&](int64_t c, T v) { own = to_acc(v) > Acc<T>(0.5) ? c : own; };
  const auto vector = [&](int64_t c, const Vec<T>& v) {
#pragma unroll
    for (int k = 0; k < Vec<T>::kSize; ++k) scalar(c + k, v.v[k]);
  };
  for_each_in_row<kRowThreads>(q, p.rows.n, p.probabilities_rows.stride_n, vector, scalar);
  return row_reduce<kRowThreads>(own, [](int64_t a, int64_t b) { return a > b ? a : b; });
}

// Of a counted row. All threads of the row come here.
template <class T, int kRowThreads, bool kGeneral>
__device__ inline OwnClass<T, kRowThreads> own_class(const CrossEntropyParams& p, int64_t row, const T* x,
                                                     int64_t target) {
  using A = Acc<T>;
  device_assert(p.target == nullptr || (target >= 0 && target < p.rows.n),
                "cross_entropy: target: expected a class index or ignore_index");
  int64_t index = target;
  if constexpr (kGeneral) {
    if (p.probabilities != nullptr) index = class_of_most<T, kRowThreads>(p, row);
  }
  if (index < 0) return {-1, 0, 0};
  A weight = weight_of<A>(p, index);
  if constexpr (kGeneral) weight += Coefficients<T, kRowThreads>(p, row)(index);
  using Index = typename OwnClass<T, kRowThreads>::Index;
  return {Index(index), to_acc(x[index * p.rows.stride_n]), weight};
}

// What forward finds out about a row (CrossEntropyParams).
template <class A>
struct RowStatistics {
  A m, sum, others, mass;
};

// Of elements that are not the own class': p · level - t · target (cross_entropy.h). kGeneral: with softcap or
// coefficients of all classes.
template <class T, int kRowThreads, bool kGeneral>
struct RowGradient {
  using A = Acc<T>;
  const Logits<A>& logits;
  const Coefficients<T, kRowThreads> coefficients;
  A half_m, scale, of_target, of_own = 0;

  __device__ RowGradient(const CrossEntropyParams& p, const Logits<A>& logits, int64_t row, const RowStatistics<A>& s,
                         const OwnClass<T, kRowThreads>& own, const RowGradOutput& grad_output)
      : logits(logits), coefficients(p, row), half_m(s.m * A(0.5)), of_target(A(grad_output.target)) {
    const double lse = p.z_loss_weight != 0 ? logits.lse(s.m, s.sum) : 0;
    const GradFactors f = grad_factors<A>(p, row, lse, grad_output);
    scale = A(f.level(own.weight, s.mass)) / s.sum;
    if (own.index < 0) return;
    const A z = logits.cap(own.logit);
    of_own = times_slope(A(f.at_own(own.weight, s.mass, logits.term(z, half_m) / s.sum, s.others / s.sum)), z);
  }

  __device__ A operator()(int64_t c, A v) const {
    if constexpr (!kGeneral) return logits.term(v, half_m) * scale;
    v = logits.cap(v);
    return times_slope(logits.term(v, half_m) * scale - coefficients(c) * of_target, v);
  }

 private:
  // The derivative of the cap.
  __device__ A times_slope(A grad, A z) const { return logits.capped ? grad * (1 - z * z) : grad; }
};

// Loads under way of a thread; where an element takes much, or a row has few, registers are for that, or for more rows.
template <int kRowThreads, bool kGeneral>
constexpr int kLogitLoads = (kGeneral ? 2 : 4) / (kRowThreads == 32 ? 2 : 1);

// Writes the gradient of a counted row.
template <class T, class Row, class Gradient>
__device__ inline void write_gradient(const CrossEntropyParams& p, const Row& row_of_logits, T* g, int64_t own,
                                      const Gradient& gradient) {
  row_of_logits.map(g, p.grad_rows.stride_n, gradient);
  if (own >= 0 && row_of_logits.meets(own)) g[own * p.grad_rows.stride_n] = from_acc<T>(gradient.of_own);
}

// Threads of a row by its size, f(integral_constant); the same for every call with rows of this size on this card, so
// that their sums have the same bits. A row that fills more than half of the shared memory has a block of all threads.
template <class T, class F>
void with_row_threads(const CrossEntropyParams& p, const F& f) {
  const int64_t n = p.rows.n;
  if (p.rows.stride_n != 1 || (p.grad_input != nullptr && p.grad_rows.stride_n != 1) || n > kLongestKeptRow)
    f(std::integral_constant<int, 1>{});
  else if (n <= 1024) f(std::integral_constant<int, 32>{});
  else if (n <= 8192) f(std::integral_constant<int, 128>{});
  else if (std::is_same_v<T, double> || n * int64_t(sizeof(T)) <= shared_for_rows(device_limits(), 2))
    f(std::integral_constant<int, 512>{});
  else if constexpr (!std::is_same_v<T, double>) f(std::integral_constant<int, 1024>{});
}

}  // namespace tse
