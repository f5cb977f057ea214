// Softmax and log-softmax backward on CUDA. [CUDA]
#include "common/cuda/logits.cuh"
#include "common/cuda/row_map_bwd.cuh"
#include "softmax/softmax.h"

namespace tse {
namespace {

template <class A>
struct SoftmaxWeights {
  static constexpr bool kCounts = false;
  __device__ static A weight(A p) { return p; }
};

// g - exp(y) Σ g, and 0 where y is -inf.
template <class A>
struct LogSoftmaxGradient {
  static constexpr bool kSkipsZeros = false, kSetsApart = false, kCounts = true;
  __device__ const LogSoftmaxGradient& of_row(const RowMapParams&, int64_t) const { return *this; }
  __device__ static bool is_inside(A y) { return y != -infinity<A>(); }
  __device__ static A weight(A) { return 1; }
  template <class, class Total>
  __device__ static Constant<A> constant(const Total& total) {
    return {A(total.sum), 0};
  }
  __device__ A operator()(A y, A g, const Constant<A>& sum) const { return g - exp2_of(y * kLog2e<A>) * sum.hi; }
};

template <class T>
constexpr auto of_softmax = launch_row_map_bwd<T, WeightedGradient<SoftmaxWeights<Acc<T>>>>;
template <class T>
constexpr auto of_log_softmax = launch_row_map_bwd<T, LogSoftmaxGradient<Acc<T>>>;

}  // namespace

void launch_softmax_bwd(const RowMapParams& p, cudaStream_t stream) { TSE_BY_DTYPE(p.dtype, of_softmax, p, {}, stream) }
void launch_log_softmax_bwd(const RowMapParams& p, cudaStream_t stream) {
  TSE_BY_DTYPE(p.dtype, of_log_softmax, p, {}, stream)
}

}  // namespace tse
