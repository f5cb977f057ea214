// Sparsemax: what the host entry hands to the kernels. [plain]
#pragma once
#include "common/types.h"

namespace tse {

struct SparsemaxParams {
  DType dtype;             // of every tensor; fp16 and bf16 are computed in fp32
  Rows rows;               // of input
  const void* input;       // (rows, n)
  Rows output_rows;        // sizes as rows
  void* output;            // (rows, n)  probabilities; forward writes them, backward reads them

  // backward
  Rows grad_output_rows;
  const void* grad_output;  // (rows, n)  any strides, 0 included; CUDA: elements are neighbours where the output's are
  Rows grad_input_rows;
  void* grad_input;  // (rows, n)
};

// CPU: rows [begin, end).
void sparsemax_fwd_rows(const SparsemaxParams& p, int64_t begin, int64_t end);
void sparsemax_bwd_rows(const SparsemaxParams& p, int64_t begin, int64_t end);

// CUDA: all rows, on `stream`, no synchronisation.
void launch_sparsemax_fwd(const SparsemaxParams& p, cudaStream_t stream);
void launch_sparsemax_bwd(const SparsemaxParams& p, cudaStream_t stream);

}  // namespace tse
