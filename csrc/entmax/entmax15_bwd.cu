// Entmax15 backward on CUDA. [CUDA]
#include "common/cuda/row_map_bwd.cuh"
#include "entmax/entmax.h"
#include "entmax/threshold.cuh"

namespace tse {

template <class T>
static constexpr auto bwd = launch_row_map_bwd<T, WeightedGradient<Entmax15Policy<Acc<T>>>>;

void launch_entmax15_bwd(const RowMapParams& p, cudaStream_t stream) { TSE_BY_DTYPE(p.dtype, bwd, p, {}, stream) }

}  // namespace tse
