// Sparsemax forward on CUDA. [CUDA]
#include "entmax/entmax_fwd.cuh"
#include "sparsemax/sparsemax.h"

namespace tse {

template <class T>
static constexpr auto fwd = launch_stored_entmax_fwd<SparsemaxPolicy, T>;

void launch_sparsemax_fwd(const RowMapParams& p, cudaStream_t stream) { TSE_BY_DTYPE(p.dtype, fwd, p, stream) }
void launch_prepared_sparsemax_fwd(const PreparedRowsParams& p, cudaStream_t stream) {
  launch_prepared_entmax_fwd<SparsemaxPolicy>(p, stream);
}

}  // namespace tse
