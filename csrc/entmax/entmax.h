// Entmax: the kernels of entmax15 and of entmax with any alpha. [plain]
#pragma once
#include "common/row_params.h"

namespace tse {

// CPU: rows [begin, end). The last two take any alpha, too; for one number with a map of its own they run the rows of
// that map: softmax for 1, entmax15, sparsemax for 2.
void entmax15_fwd_rows(const RowMapParams& p, int64_t begin, int64_t end);
void entmax15_bwd_rows(const RowMapParams& p, int64_t begin, int64_t end);
void entmax_fwd_rows(const RowMapParams& p, int64_t begin, int64_t end);
void entmax_bwd_rows(const RowMapParams& p, int64_t begin, int64_t end);
void fwd_rows_of_alpha(const RowMapParams& p, int64_t begin, int64_t end);
void bwd_rows_of_alpha(const RowMapParams& p, int64_t begin, int64_t end);
// The gradient of each row's alpha, of float32 or float64 rows that are contiguous. grad_input: (rows), float64.
void alpha_bwd_rows(const RowMapParams& p, int64_t begin, int64_t end);

// CUDA: what the probabilities of a row follow from, for the losses: with c = alpha - 1, p = scale · u^(1/c) of
// u = max((t + rest) - c (max x - x), 0); next to alpha = 1 and below, t is one less (any_alpha.cuh).
template <class A>
struct RowThreshold {
  A max, t, rest, scale;
  A others;  // of a loss: Σ p without the target's class
};
constexpr int64_t kThresholdNumbers = sizeof(RowThreshold<float>) / sizeof(float);

// CUDA: all rows, on `stream`, no synchronisation.
TSE_CUDA void launch_entmax15_fwd(const RowMapParams& p, cudaStream_t stream);
TSE_CUDA void launch_entmax15_bwd(const RowMapParams& p, cudaStream_t stream);
TSE_CUDA void launch_prepared_entmax15_fwd(const PreparedRowsParams& p, cudaStream_t stream);
TSE_CUDA void launch_prepared_entmax_fwd(const PreparedRowsParams& p, cudaStream_t stream);
TSE_CUDA void launch_entmax_bwd(const RowMapParams& p, cudaStream_t stream);

}  // namespace tse
