// Entmax of any alpha, backward on CUDA. [CUDA]
#include "common/cuda/row_map_bwd.cuh"
#include "entmax/any_alpha.cuh"
#include "entmax/entmax.h"
#include "softmax/softmax.h"
#include "sparsemax/sparsemax.h"

namespace tse {
namespace {

template <class A>
struct AlphaGradient : WeightedGradient<AlphaWeights<A>> {
  // Above 2 the smallest probability may have most of the weight.
  __device__ static bool is_most(A, A weight, A most) { return weight > most; }

  __device__ AlphaGradient of_row(const RowMapParams& p, int64_t row) const {
    AlphaGradient result;
    result.c = A(p.alpha(row) - 1);
    return result;
  }
};

template <class T>
constexpr auto bwd = launch_row_map_bwd<T, AlphaGradient<Acc<T>>, /*kRegisters=*/false>;

}  // namespace

// One alpha with a map of its own takes that.
void launch_entmax_bwd(const RowMapParams& p, cudaStream_t stream) {
  const double alpha = p.alpha.each == nullptr ? p.alpha.same : 0;
  if (alpha == 1) return launch_softmax_bwd(p, stream);
  if (alpha == 1.5) return launch_entmax15_bwd(p, stream);
  if (alpha == 2) return launch_sparsemax_bwd(p, stream);
  TSE_BY_DTYPE(p.dtype, bwd, p, {}, stream)
}

}  // namespace tse
