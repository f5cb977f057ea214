// Entmax: the kernels. [plain]
#pragma once
#include "common/row_params.h"

namespace tse {

// CUDA: all rows, on `stream`, no synchronisation.
TSE_CUDA void launch_entmax15_fwd(const RowMapParams& p, cudaStream_t stream);
TSE_CUDA void launch_entmax15_bwd(const RowMapParams& p, cudaStream_t stream);

}  // namespace tse
