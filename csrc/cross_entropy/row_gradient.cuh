// The own class and the gradient of a row, for backward and for a forward that knows grad_output. [CUDA]
#pragma once
#include "common/cuda/logits.cuh"
#include "common/cuda/reduce.cuh"
#include "common/cuda/row.cuh"
#include "cross_entropy/cross_entropy.h"

namespace tse {

// The weights t of all classes but for the target's own: smoothing · w / C, and probabilities.
template <class T, int kRowThreads>
struct Coefficients {
  using A = Acc<T>;
  const T* probabilities = nullptr;
  const int64_t stride;  // 1 where a row has several threads
  const A* weight;
  A keep, even;
  __device__ Coefficients(const CrossEntropyParams& p, int64_t row)
      : stride(kRowThreads == 1 ? p.probabilities_rows.stride_n : 1),
        weight(static_cast<const A*>(p.weight)),
        keep(A(1 - p.label_smoothing)),
        even(A(p.label_smoothing / double(p.rows.n))) {
    if (p.probabilities != nullptr)
      probabilities = static_cast<const T*>(p.probabilities) + row_offset(p.probabilities_rows, row);
  }
  __device__ A operator()(int64_t c) const {
    const A t = probabilities == nullptr ? even : even + keep * A(to_acc(probabilities[c * stride]));
    return weight == nullptr ? t : t * weight[c];
  }
};

// The own class of a row (cross_entropy.h). index -1: none.
template <class T, int kRowThreads>
struct OwnClass {
  using Index = std::conditional_t<kRowThreads == 1, int64_t, int>;  // kLongestRow
  Index index;
  Acc<T> weight;  // what the target gives it
};

// The class that has more than half of the probability.
template <class T, int kRowThreads>
__device__ inline int64_t class_of_most(const CrossEntropyParams& p, int64_t row, int& turn) {
  const T* q = static_cast<const T*>(p.probabilities) + row_offset(p.probabilities_rows, row);
  int64_t own = -1;
  const auto scalar = [&](int64_t c, T v) { own = to_acc(v) > Acc<T>(0.5) ? c : own; };
  const auto vector = [&](int64_t c, const Vec<T>& v) {
#pragma unroll
    for (int k = 0; k < Vec<T>::kSize; ++k) scalar(c + k, v.v[k]);
  };
  KeptRow<kRowThreads, T, 1>(Stored<T>{q, p.probabilities_rows.stride_n}, p.rows.n).read(false, vector, scalar);
  return row_reduce<kRowThreads>(own, turn, [](int64_t a, int64_t b) { return a > b ? a : b; });
}

// Of a counted row. All threads of the row come here.
template <class T, int kRowThreads, bool kGeneral>
__device__ inline OwnClass<T, kRowThreads> own_class(const CrossEntropyParams& p, int64_t row, int64_t target,
                                                     int& turn) {
  using A = Acc<T>;
  using Index = typename OwnClass<T, kRowThreads>::Index;
  device_assert(p.target == nullptr || (target >= 0 && target < p.rows.n),
                "cross_entropy: target: expected a class index or ignore_index");
  if constexpr (!kGeneral) return {Index(target), p.weight == nullptr ? A(1) : static_cast<const A*>(p.weight)[target]};
  const int64_t index = p.probabilities != nullptr ? class_of_most<T, kRowThreads>(p, row, turn) : target;
  if (index < 0) return {-1, 0};
  return {Index(index), weight_of<A>(p, index) + Coefficients<T, kRowThreads>(p, row)(index)};
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
  using Own = OwnClass<T, kRowThreads>;
  const Logits<A>& logits;
  const RowStatistics<A>& s;
  const Coefficients<T, kRowThreads> coefficients;
  const GradFactors factors;
  A half_m, scale;

  __device__ RowGradient(const CrossEntropyParams& p, const Logits<A>& logits, int64_t row, const RowStatistics<A>& s,
                         const Own& own, const RowGradOutput& grad_output)
      : logits(logits),
        s(s),
        coefficients(p, row),
        factors(grad_factors<A>(p, row, p.z_loss_weight != 0 ? logits.lse(s.m, s.sum) : 0, grad_output)),
        half_m(s.m * A(0.5)),
        scale(A(factors.level(own.weight, s.mass)) / s.sum) {}

  __device__ A operator()(int64_t c, A v) const {
    if constexpr (!kGeneral) return logits.term(v, half_m) * scale;
    v = logits.cap(v);
    return times_slope(logits.term(v, half_m) * scale - coefficients(c) * A(factors.target), v);
  }
  __device__ A at_own(const Own& own, A logit) const {
    const A z = logits.cap(logit);
    return times_slope(A(factors.at_own(own.weight, s.mass, logits.term(z, half_m) / s.sum, s.others / s.sum)), z);
  }

 private:
  // The derivative of the cap.
  __device__ A times_slope(A grad, A z) const { return logits.capped ? grad * (1 - z * z) : grad; }
};

// Writes the gradient of a counted row. own_logit was read before, as the gradient may take its place.
template <class T, class Row, class Own, class Gradient>
__device__ inline void write_gradient(const StoredOutput<T>& g, const Row& row, const Own& own, Acc<T> own_logit,
                                      const Gradient& gradient) {
  map_row<T>(row, g, gradient);
  if (own.index >= 0 && row.meets(own.index)) g.set(own.index, from_acc<T>(gradient.at_own(own, own_logit)));
}

// Loads under way of a thread; where an element takes much, or a row has few, registers are for that, or for more rows.
template <int kRowThreads, bool kGeneral>
constexpr int kLogitLoads = (kGeneral ? 2 : 4) / (kRowThreads == 32 ? 2 : 1);

// The plan of the call's rows; with options, whose arithmetic takes registers, none are held there.
template <class T, bool kGeneral, class F>
void with_plan_of(const CrossEntropyParams& p, const F& f) {
  const bool contiguous = p.rows.stride_n == 1 && (p.grad_input == nullptr || p.grad_rows.stride_n == 1);
  with_plan<T, !kGeneral>(p.rows.n, contiguous, f);
}

}  // namespace tse
