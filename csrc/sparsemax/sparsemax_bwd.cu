// Sparsemax backward on CUDA. [CUDA]
#include "common/cuda/row_map_bwd.cuh"
#include "entmax/threshold.cuh"
#include "sparsemax/sparsemax.h"

namespace tse {

template <class T>
static constexpr auto bwd = launch_row_map_bwd<T, WeightedGradient<SparsemaxPolicy<Acc<T>>>>;

void launch_sparsemax_bwd(const RowMapParams& p, cudaStream_t stream) { TSE_BY_DTYPE(p.dtype, bwd, p, {}, stream) }

}  // namespace tse
