// Sparsemax backward on CUDA. [CUDA]
#include "entmax/entmax_bwd.cuh"
#include "sparsemax/sparsemax.h"

namespace tse {

template <class T>
static constexpr auto bwd = launch_entmax_bwd<T, SparsemaxPolicy<Acc<T>>>;

void launch_sparsemax_bwd(const RowMapParams& p, cudaStream_t stream) { TSE_BY_DTYPE(p.dtype, bwd, p, {}, stream) }

}  // namespace tse
