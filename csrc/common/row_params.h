// What the host entry of a row map hands to its kernels. [plain]
#pragma once
#include "common/types.h"

namespace tse {

// A number for each row: the same for all, or one of a tensor that is broadcast over the rows.
struct RowNumbers {
  double same = 1;
  const double* each = nullptr;
  RowIndex at;

  TSE_HOST_DEVICE double operator()(int64_t row) const { return each == nullptr ? same : each[at.offset(row)]; }
};

struct RowMapParams {
  DType dtype;         // of every tensor; fp16 and bf16 are computed in fp32
  Rows rows;           // of input
  const void* input;   // (rows, n)
  Rows output_rows;    // sizes as rows
  void* output;        // (rows, n)  forward writes it, backward reads it

  // backward
  Rows grad_output_rows;
  const void* grad_output;  // (rows, n)  any strides, 0 included; CUDA: elements are contiguous where the output's are
  Rows grad_input_rows;
  void* grad_input;  // (rows, n)

  RowNumbers alpha;  // of entmax
  void* thresholds;  // (rows)  CUDA: a RowThreshold each, which forward writes instead of the output; nullptr: none
  RowNumbers temperature;  // CUDA, backward: what the gradient is divided by
  int64_t first_row;  // the row of `alpha` that is row 0 of the tensors

  ShareRow* share_row;  // CPU: nullptr where a row belongs to one thread
};

// Rows that a kernel cannot take as they are: scaled by a temperature, masked, or of another dtype than the result. On
// the CPU they are prepared in tiles of `map.dtype`, the type of the arithmetic, on which `kernel` runs.
struct PreparedRowsParams {
  RowMapParams map;
  void (*kernel)(const RowMapParams& p, int64_t begin, int64_t end);
  DType input_dtype;  // of input and grad_input
  DType output_dtype;  // of output and grad_output
  RowNumbers temperature;
  const void* mask;  // nullptr: none. Broadcast over the rows
  bool mask_is_bool;  // else it is added and has the type of the arithmetic
  RowIndex mask_at;  // the first element of a row's mask
  int64_t mask_stride_n;
  ShareRow* share_row;
};

// CPU: rows [begin, end) of a map.
void prepared_fwd_rows(const PreparedRowsParams& p, int64_t begin, int64_t end);
void prepared_bwd_rows(const PreparedRowsParams& p, int64_t begin, int64_t end);

}  // namespace tse
