// Softmax cross-entropy with class indices: what the host entry hands to the kernels. [plain]
#pragma once
#include "common/types.h"

namespace tse {

struct CrossEntropyParams {
  DType dtype;             // of input and grad_input; fp16 and bf16 are computed in fp32
  Rows rows;               // of input; n = classes
  const void* input;       // (rows, n)  logits
  const void* target;      // (rows)     class indices, contiguous
  bool target_is_int32;    //            else int64
  int64_t ignore_index;    // a target that is not counted: loss 0, gradient 0
  Reduction reduction;     // class weights, smoothing, z-loss, softcap and temperature will stand beside it

  // forward
  void* row_loss;          // (rows)     float32, or float64 for float64 logits
  void* row_m;  // (rows)     Σ exp2(x · log2(e)) = row_sum · 2^row_m, row_m an integer: what backward needs.
  void* row_sum;  // (rows)     An lse of the same size would put its rounding into every gradient.
  void* loss;  // ()         with mean or sum: the reduced loss, in row_loss' dtype
  double* total_weight;  // ()         counted targets: the divisor of the mean

  // backward
  Rows grad_rows;  // of grad_input; sizes as rows
  void* grad_input;  // (rows, n)
  const void* grad_output;  // (rows) for kNone, else (); in row_loss' dtype
  int64_t grad_output_stride;
};

TSE_HOST_DEVICE inline int64_t target_of(const CrossEntropyParams& p, int64_t row) {
  return p.target_is_int32 ? static_cast<const int32_t*>(p.target)[row] : static_cast<const int64_t*>(p.target)[row];
}

// What the gradient of a counted row is multiplied with; A is row_loss' type.
template <class A>
TSE_HOST_DEVICE inline A factor_of(const CrossEntropyParams& p, int64_t row) {
  const double g = static_cast<const A*>(p.grad_output)[row * p.grad_output_stride];
  return A(p.reduction == Reduction::kMean ? g / *p.total_weight : g);
}

// CPU: rows [begin, end). The targets were checked. fwd_bwd reads a row's logits again for its gradient while they are
// in cache.
void cross_entropy_fwd_rows(const CrossEntropyParams& p, int64_t begin, int64_t end);
void cross_entropy_bwd_rows(const CrossEntropyParams& p, int64_t begin, int64_t end);
void cross_entropy_fwd_bwd_rows(const CrossEntropyParams& p, int64_t begin, int64_t end);

// CPU, fewer rows than threads: blocks [begin, end) of one row with contiguous elements. First the sums of the blocks,
// then (all blocks known) the row's loss, then the gradient of the blocks' elements. The same bits as by rows.
struct BlockSum {
  double m;  // Σ exp2(x · log2(e)) = sum · 2^m; -inf and 0: nothing was added
  double sum;
};
constexpr int64_t kCrossEntropyBlock = 4096;  // elements: what stays in L1
void cross_entropy_block_sums(const CrossEntropyParams& p, int64_t row, int64_t begin, int64_t end, BlockSum* sums);
void cross_entropy_finish_row(const CrossEntropyParams& p, int64_t row, const BlockSum* sums);
void cross_entropy_bwd_blocks(const CrossEntropyParams& p, int64_t row, int64_t begin, int64_t end);

// CUDA: all rows, on `stream`, no synchronisation. A target outside [0, n) trips a device-side assertion.
void launch_cross_entropy_fwd(const CrossEntropyParams& p, cudaStream_t stream);
void launch_cross_entropy_bwd(const CrossEntropyParams& p, cudaStream_t stream);

}  // namespace tse
