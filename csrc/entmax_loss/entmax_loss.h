// Losses of sparsemax and entmax: what the host entry hands to the rows, and the kernels. [plain]
//
// L = Ω*(x) + Ω(y) - <x, y> (Blondel, Martins & Niculae 2020), whose gradient is p - y. With c = alpha - 1 and
// w(p) = (1 - p^c) / c, L = <p - y, x> + (Σ p w(p) - Σ y w(y)) / alpha; of a class y, w(y) is 0. p is where this is
// largest, so that an error of p is seen in L only as its square. For alpha = 1 it is cross-entropy.
#pragma once
#include "common/row_params.h"

namespace tse {

enum class EntmaxLossName : int32_t { kSparsemax, kEntmax15, kEntmax };

struct EntmaxLossParams {
  EntmaxLossName name;  // as which errors know it
  // rows, input and alpha; the grad_input, if one is wanted; dtype: of the arithmetic. On CUDA also the
  // thresholds.
  RowMapParams map;
  void (*probabilities)(const RowMapParams& p, int64_t begin, int64_t end);  // CPU: the map
  DType dtype;  // of input, distribution and grad_input
  const void* target;  // (rows)  class indices, contiguous; nullptr: distributions
  bool target_is_int32;
  const void* distribution;  // (rows, n)
  Rows distribution_rows;
  int64_t ignore_index;
  void* row_loss;  // (rows)  in the type of the arithmetic; nullptr: not asked for
  const void* grad_output;  // (rows) or (); in the same type
  int64_t grad_output_stride;
  double divisor;  // of grad_output
  ShareRow* share_row;
};

// CPU: rows [begin, end), whose targets were checked: losses and gradients, from one reading of the logits.
void entmax_loss_rows(const EntmaxLossParams& p, int64_t begin, int64_t end);

// CUDA: all rows, on `stream`, no synchronisation. The thresholds come from launch_prepared_entmax_fwd; forward adds
// what backward needs.
TSE_CUDA void launch_entmax_loss_fwd(const EntmaxLossParams& p, cudaStream_t stream);
TSE_CUDA void launch_entmax_loss_bwd(const EntmaxLossParams& p, cudaStream_t stream);

}  // namespace tse
