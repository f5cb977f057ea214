// The gradient of a row, for backward and for a forward that knows what will come in. [CUDA]
#pragma once
#include "common/cuda/kept_row.cuh"
#include "cross_entropy/coefficients.cuh"
#include "cross_entropy/cross_entropy.h"
#include "cross_entropy/exp_sum.cuh"

namespace tse {

// What comes into a row, divided for the mean and by the temperature: into Σ t (lse - s), and into lse by the z-loss,
// of an lse of 1. Divisions in double are rare where the GPU has few units for them: once a block, if rows are alike.
struct IncomingGradient {
  double target;
  double z;
};
template <class A>
__device__ inline IncomingGradient incoming_gradient(const CrossEntropyParams& p, double grad, const double* divisors) {
  const bool mean = p.reduction == Reduction::kMean;
  const double temperature = p.transform.temperature;
  IncomingGradient in = {double(A(mean ? grad / divisors[0] : grad)), 0};
  if (p.z_loss_weight != 0) in.z = 2 * p.z_loss_weight * (mean ? grad / divisors[1] : grad);
  if (temperature != 1) in = {in.target / temperature, in.z / temperature};
  return in;
}

// grad_s = p · softmax - t · target (cross_entropy.h). kGeneral: with softcap or coefficients of all classes.
template <class T, bool kGeneral>
struct RowGradient {
  using A = Acc<T>;
  const Logits<A>& logits;
  const Coefficients<T> coefficients;
  const A m, sum;
  A of_target, scale;
  double softmax;

  __device__ RowGradient(const CrossEntropyParams& p, const Logits<A>& logits, int64_t row, A m, A sum, A mass,
                         const IncomingGradient& in)
      : logits(logits), coefficients(p, row), m(m), sum(sum), of_target(A(in.target)) {
    softmax = double(mass) * in.target;
    if (p.z_loss_weight != 0) softmax += in.z * ((double(m) + double(log2(sum))) * kLn2<A>);
    if (p.grad_lse != nullptr) softmax += double(static_cast<const A*>(p.grad_lse)[row]) / p.transform.temperature;
    scale = A(softmax) / sum;
  }

  // Of element c with logit v, but for what the target's own has beside.
  __device__ A operator()(int64_t c, A v) const {
    if constexpr (!kGeneral) return logits.term(v, m) * scale;
    v = logits.cap(v);
    const A grad = logits.term(v, m) * scale - coefficients(c) * of_target;
    return logits.capped ? grad * (1 - v * v) : grad;
  }

  // Of the target's element. Its probability and what is taken from it may be equal, and then their difference is 0.
  __device__ A at_target(int64_t c, A v, A weight) const {
    v = logits.cap(v);
    double grad = softmax * (double(logits.term(v, m)) / double(sum)) - double(weight) * double(of_target);
    if constexpr (kGeneral) grad -= double(coefficients(c)) * double(of_target);
    return A(logits.capped ? grad * double(1 - v * v) : grad);
  }
};

// A row of logits; where an element takes much, or a row has few, registers are for that, or for more rows.
template <class T, int kRowThreads, bool kGeneral>
using LogitRow = KeptRow<kRowThreads, T, (kGeneral ? 2 : 4) / (kRowThreads == 32 ? 2 : 1)>;

// Writes the gradient of a counted row. at_target: the target's logit, which the gradient may take the place of.
template <class T, bool kGeneral, class Row>
__device__ inline void write_gradient(const CrossEntropyParams& p, const Row& row_of_logits, T* g, int64_t target,
                                      Acc<T> at_target, const RowGradient<T, kGeneral>& gradient) {
  const bool has_target = p.target != nullptr && row_of_logits.meets(target);
  Acc<T> own = 0;
  if (has_target) own = gradient.at_target(target, at_target, weight_of<Acc<T>>(p, target));
  row_of_logits.map(g, p.grad_rows.stride_n, gradient);
  if (has_target) g[target * p.grad_rows.stride_n] = from_acc<T>(own);
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
