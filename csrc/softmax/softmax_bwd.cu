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

// g - p Σ g with p = exp(y), and 0 where y is -inf. The p next to 1, of which a row has at most one, is set apart: its
// gradient is g q - p Σ of the other g, where q = 1 - p is Σ of the other p.
template <class A>
struct LogSoftmaxGradient {
  static constexpr bool kSkipsZeros = false, kSetsApart = true, kCounts = false;
  struct Sums {
    A all, others, lacking;
  };
  __device__ const LogSoftmaxGradient& of_row(const RowMapParams&, int64_t) const { return *this; }
  __device__ static bool is_inside(A y) { return y != -infinity<A>(); }
  __device__ static bool is_next_to_one(A y) { return y > A(kNextToOne); }
  __device__ static bool is_most(A y, A, A) { return is_next_to_one(y); }
  __device__ static A weight(A y) { return exp2_of(y * kLog2e<A>); }
  __device__ static A term(A, A g) { return g; }
  template <class>
  __device__ static Sums constant(const ApartTotal<A>& total) {
    return {A(total.sum + (total.most > 0 ? double(total.of_most) : 0)), A(total.sum), A(total.weight)};
  }
  __device__ A operator()(A y, A g, const Sums& sums) const {
    const A p = weight(y);
    return is_next_to_one(y) ? g * sums.lacking - p * sums.others : g - p * sums.all;
  }
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
