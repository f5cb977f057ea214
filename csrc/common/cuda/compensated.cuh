// A sum and what its roundings left, so that its error does not grow with the number of terms. [CUDA]
#pragma once
#include "common/cuda/vec.cuh"

namespace tse {

// Two numbers of A, so that sums over long rows need no double, of which many GPUs compute little.
template <class A>
struct Compensated {
  A sum = 0, rest = 0;

  // Exact where the sum is the larger one; a term that is not, early in a row, has its own rounding.
  __device__ void add(A v) {
    const A s = sum + v;
    rest += v - (s - sum);
    sum = s;
  }
  // The same bits whichever of the two is added to the other.
  __device__ void add(const Compensated& other) {
    const A s = sum + other.sum, of_other = s - sum;
    rest = (rest + other.rest) + ((sum - (s - of_other)) + (other.sum - of_other));
    sum = s;
  }
  __device__ void scale(A factor) {
    sum *= factor;
    rest *= factor;
  }
  // Of an infinite sum `rest` is NaN.
  __device__ A value() const { return rest == rest ? sum + rest : sum; }
};

}  // namespace tse
