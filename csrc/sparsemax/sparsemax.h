// Sparsemax: the kernels. [plain]
#pragma once
#include "common/row_params.h"

namespace tse {

// CPU: rows [begin, end).
void sparsemax_fwd_rows(const RowMapParams& p, int64_t begin, int64_t end);
void sparsemax_bwd_rows(const RowMapParams& p, int64_t begin, int64_t end);

// CUDA: all rows, on `stream`, no synchronisation.
TSE_CUDA void launch_sparsemax_fwd(const RowMapParams& p, cudaStream_t stream);
TSE_CUDA void launch_sparsemax_bwd(const RowMapParams& p, cudaStream_t stream);
TSE_CUDA void launch_prepared_sparsemax_fwd(const PreparedRowsParams& p, cudaStream_t stream);

}  // namespace tse
