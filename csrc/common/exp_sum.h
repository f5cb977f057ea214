// What operators that sum exponentials of logits tell their kernels. [plain]
#pragma once
#include <cmath>

#include "common/types.h"

namespace tse {

// log2(e) and its inverse, rounded to the type: the base of exp and log. Only differences feel the rounding.
template <class A>
constexpr A kLog2e = A(1.4426950408889634);
template <class A>
constexpr A kLn2 = A(1 / double(kLog2e<A>));

template <class A>
TSE_HOST_DEVICE inline double lse_of(A m, A sum) {
  return (double(m) + log2(double(sum))) * kLn2<A>;
}

// s = softcap · tanh(x / softcap), where there is one, then s / temperature.
struct LogitTransform {
  double temperature = 1;
  double softcap = 0;  // 0: none
};

// Part of a row. With t = s · log2(e) - m: sum = Σ 2^t; and for coefficients u that the operator chooses,
// linear = Σ u · t and mass = Σ u. m is an integer; -inf and 0: nothing was added.
struct BlockSum {
  double m;
  double sum;
  double linear = 0;
  double mass = 0;
};
constexpr int64_t kExpSumBlock = 4096;  // elements: what stays in L1

}  // namespace tse
