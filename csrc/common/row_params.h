// What the host entry of a row map hands to its kernels. [plain]
#pragma once
#include "common/types.h"

namespace tse {

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

  ShareRow* share_row;  // CPU: nullptr where a row belongs to one thread
};

}  // namespace tse
