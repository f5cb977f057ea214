// Entmax15 forward on CUDA. [CUDA]
#include "entmax/entmax.h"
#include "entmax/entmax_fwd.cuh"

namespace tse {

template <class T>
static constexpr auto fwd = launch_entmax_fwd<T, Entmax15Policy<Acc<T>>>;

void launch_entmax15_fwd(const RowMapParams& p, cudaStream_t stream) { TSE_BY_DTYPE(p.dtype, fwd, p, {}, stream) }

}  // namespace tse
