// What the target gives to all classes. [CUDA]
#pragma once
#include "common/cuda/vec.cuh"
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

}  // namespace tse
