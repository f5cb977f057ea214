// Sparsemax forward on CUDA. [CUDA]
#include "entmax/entmax_fwd.cuh"
#include "sparsemax/sparsemax.h"

namespace tse {

template <class T>
static constexpr auto fwd = launch_entmax_fwd<T, SparsemaxPolicy<Acc<T>>>;

void launch_sparsemax_fwd(const RowMapParams& p, cudaStream_t stream) { TSE_BY_DTYPE(p.dtype, fwd, p, {}, stream) }

}  // namespace tse
