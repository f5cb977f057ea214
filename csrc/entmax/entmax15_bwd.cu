// Entmax15 backward on CUDA. [CUDA]
#include "entmax/entmax.h"
#include "entmax/entmax_bwd.cuh"

namespace tse {

template <class T>
static constexpr auto bwd = launch_entmax_bwd<T, Entmax15Policy<Acc<T>>>;

void launch_entmax15_bwd(const RowMapParams& p, cudaStream_t stream) { TSE_BY_DTYPE(p.dtype, bwd, p, {}, stream) }

}  // namespace tse
