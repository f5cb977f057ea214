// Softmax and log-softmax: the kernels. [plain]
#pragma once
#include "common/row_params.h"

namespace tse {

// Backward of log-softmax: above this log p, of which a row has at most one, 1 - p is the sum of the other p.
constexpr double kNextToOne = -1.0 / 64;

// CPU: rows [begin, end).
void softmax_fwd_rows(const RowMapParams& p, int64_t begin, int64_t end);
void softmax_bwd_rows(const RowMapParams& p, int64_t begin, int64_t end);
void log_softmax_fwd_rows(const RowMapParams& p, int64_t begin, int64_t end);
void log_softmax_bwd_rows(const RowMapParams& p, int64_t begin, int64_t end);

// CUDA: all rows, on `stream`, no synchronisation.
TSE_CUDA void launch_softmax_fwd(const RowMapParams& p, cudaStream_t stream);
TSE_CUDA void launch_softmax_bwd(const RowMapParams& p, cudaStream_t stream);
TSE_CUDA void launch_log_softmax_fwd(const RowMapParams& p, cudaStream_t stream);
TSE_CUDA void launch_log_softmax_bwd(const RowMapParams& p, cudaStream_t stream);
TSE_CUDA void launch_prepared_softmax_fwd(const PreparedRowsParams& p, cudaStream_t stream);
TSE_CUDA void launch_prepared_log_softmax_fwd(const PreparedRowsParams& p, cudaStream_t stream);

}  // namespace tse
