// Entmax15 forward on CUDA. [CUDA]
#include "entmax/entmax.h"
#include "entmax/entmax_fwd.cuh"

namespace tse {

template <class T>
static constexpr auto fwd = launch_stored_entmax_fwd<Entmax15Policy, T>;

void launch_entmax15_fwd(const RowMapParams& p, cudaStream_t stream) { TSE_BY_DTYPE(p.dtype, fwd, p, stream) }
void launch_prepared_entmax15_fwd(const PreparedRowsParams& p, cudaStream_t stream) {
  launch_prepared_entmax_fwd<Entmax15Policy>(p, stream);
}

}  // namespace tse
