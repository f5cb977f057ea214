// Log-probabilities at given classes, and the entropy: what the host entry hands to the kernels. [plain]
//
// With s = softcap and temperature applied to the logits, lse = log Σ exp(s) and p = exp(s - lse):
//   logp_k = s[y_k] - lse,    H = lse - Σ p · s,
//   grad_s[c] = Σ_k g_k [c = y_k] - p[c] (Σ_k g_k + g_H (log p[c] + H)).
#pragma once
#include "common/exp_sum.h"
#include "common/types.h"

namespace tse {

struct SelectiveLogSoftmaxParams {
  DType dtype;              // of input and grad_input; fp16 and bf16 are computed in fp32
  Rows rows;                // of input; n = classes
  const void* input;        // (rows, n)  logits
  const void* index;        // (rows, k)  classes, contiguous
  bool index_is_int32;      //            else int64
  int64_t k;
  LogitTransform transform;

  // What the rows' arrays are in: float32, or float64 for float64 logits. Forward writes them, backward reads them.
  void* row_m;              // (rows)     Σ exp(s) = row_sum · exp(slope · row_m): exp_sum.h
  void* row_sum;            // (rows)
  void* row_others;         // (rows)     row_sum without the class that has more than half of it, if index names it
  void* row_mean;           // (rows)     Σ p t with t = (z - row_m) · exponent_scale; only with entropy

  // forward
  void* logp;               // (rows, k)
  void* entropy;            // (rows)     nullptr: not asked for

  // backward
  Rows grad_rows;           // of grad_input; sizes as rows
  void* grad_input;         // (rows, n)
  const void* grad_logp;    // (rows, k)  contiguous; nullptr: 0
  const void* grad_entropy; // (rows)     contiguous; nullptr: 0

  ShareRow* share_row;      // CPU: nullptr where a row belongs to one thread
};

TSE_HOST_DEVICE inline int64_t index_of(const SelectiveLogSoftmaxParams& p, int64_t row, int64_t k) {
  const int64_t i = row * p.k + k;
  return p.index_is_int32 ? static_cast<const int32_t*>(p.index)[i] : static_cast<const int64_t*>(p.index)[i];
}

// p[c] (Σ_k g_k + g_H (log p[c] + H)) / temperature = exp2(t) (level + slope (t - mean)).
template <class A>
struct SelectiveGrad {
  A m, sum, mean;
  A level, slope;
};
// total: Σ_k g_k.
template <class A>
TSE_HOST_DEVICE inline SelectiveGrad<A> selective_grad(const SelectiveLogSoftmaxParams& p, int64_t row, double total) {
  SelectiveGrad<A> g;
  g.m = static_cast<const A*>(p.row_m)[row];
  g.sum = static_cast<const A*>(p.row_sum)[row];
  const double scale = 1 / (double(g.sum) * p.transform.temperature);
  g.level = A(total * scale);
  g.mean = g.slope = 0;
  if (p.grad_entropy == nullptr) return g;
  g.mean = static_cast<const A*>(p.row_mean)[row];
  g.slope = A(double(static_cast<const A*>(p.grad_entropy)[row]) * double(kLn2<A>) * scale);
  return g;
}

// Below, exp2(t) is 0. So far are exponents of -inf brought up, so that 0 · t is 0.
template <class A>
constexpr A kLowestExponent = A(sizeof(A) == 8 ? -1100 : -200);

// CPU: rows [begin, end), whose classes are neighbours in memory. The indices were checked.
void selective_log_softmax_fwd_rows(const SelectiveLogSoftmaxParams& p, int64_t begin, int64_t end);
void selective_log_softmax_bwd_rows(const SelectiveLogSoftmaxParams& p, int64_t begin, int64_t end);

// CUDA: all rows, on `stream`, no synchronisation. An index outside [0, n) trips a device-side assertion.
TSE_CUDA void launch_selective_log_softmax_fwd(const SelectiveLogSoftmaxParams& p, cudaStream_t stream);
TSE_CUDA void launch_selective_log_softmax_bwd(const SelectiveLogSoftmaxParams& p, cudaStream_t stream);

}  // namespace tse
