// Softmax cross-entropy: what the host entry hands to the kernels. [plain]
//
// With s = softcap and temperature applied to the logits, lse = log Σ exp(s) and p = exp(s - lse):
//   loss = Σ t (lse - s) + z_loss_weight · lse²,    grad_s = (g Σ t + 2 · z_loss_weight · lse · gz + g_lse) p - g t
// where t are the target's weights: of classes as indices, w[y] · (1 - smoothing) at y and w · smoothing / C
// everywhere; of class probabilities q, w · ((1 - smoothing) q + smoothing / C). g and gz are grad_output, for the mean
// divided by Σ w[y] and by the number of counted targets.
//
// Near certainty, 1 - p of the own class (the target's; of probabilities the one with more than half) is the sum of the
// other classes' terms over the whole sum: a difference of rounded numbers would have no correct digit. So sums are
// taken without the own class, whose term is added last.
#pragma once
#include "common/exp_sum.h"
#include "common/types.h"

namespace tse {

// CUDA: the grad_output that forward assumes when it writes the gradient.
enum class Assumed : int32_t {
  kNone,  // none: backward writes the gradient
  kFixed,  // fixed_grad_output
  kGuessed,  // the last one of this stream, if it occurred twice in a row; else none
  kGuessedOrOne,  // the same; else 1
};

// CUDA: the state of a stream between calls, on the device; zero at first.
struct CrossEntropyState {
  double last[3];  // grad_output of the last backward, by reduction
  int repeated[3];  // whether it was the same in the one before
  unsigned ticket;  // blocks of the running grid that are done
};

// CUDA: sums over the rows of a block.
struct CrossEntropySums {
  double loss;
  double z_loss;
  double weight;
  double counted;
};

struct CrossEntropyParams {
  DType dtype;  // of input and grad_input; fp16 and bf16 are computed in fp32
  Rows rows;  // of input; n = classes
  int64_t image;  // rows of one sample: the sizes after the dimension of the classes
  const void* input;  // (rows, n)  logits
  const void* target;  // (rows)     class indices, contiguous
  bool target_is_int32;  //            else int64
  const void* probabilities;  // (rows, n)  instead of target, in input's dtype
  Rows probabilities_rows;
  int64_t ignore_index;  // a target that is not counted: loss 0, gradient 0
  Reduction reduction;
  const void* weight;  // (n)        of the classes, in row_loss' dtype; nullptr: 1
  double label_smoothing;
  double z_loss_weight;
  LogitTransform transform;

  // forward
  void* row_loss;  // (rows)     float32, or float64 for float64 logits; z-loss included for kNone; CUDA: or nullptr
  void* row_m;  // (rows)     Σ exp(s) = row_sum · exp(slope · row_m): what backward needs. An lse of the same size
  void* row_sum;  // (rows)     would put its rounding into every gradient. row_m: exp_sum.h
  void* row_others;  // (rows)     row_sum without the own class
  void* row_mass;  // (rows)     Σ t without the own class; only with smoothing or probabilities
  int64_t* predictions;  // (rows)     argmax, ignore_index where ignored; nullptr: not asked for
  void* loss;  // ()         with mean or sum: the reduced loss, in row_loss' dtype
  void* z_loss;  // ()         the z-loss in it; nullptr: not asked for
  double* total_weight;  // (2)        divisor of the mean; counted targets
  double* guess;  // ()         CUDA: the grad_output that grad_input is written for, NaN: it is not written
  CrossEntropySums* sums;  // CUDA: cross_entropy_scratch bytes
  Assumed assumed;
  double fixed_grad_output;

  // backward
  Rows grad_rows;  // of grad_input; sizes as rows
  void* grad_input;  // (rows, n)
  const void* grad_output;  // (rows) for kNone, else (); in row_loss' dtype
  int64_t grad_output_stride;
  const void* grad_lse;  // (rows)     what comes into lse; nullptr: nothing
  bool compare_guess;  // CUDA: grad_input stays as it is where grad_output is the guess

  // CPU
  bool forward, backward;  // what cross_entropy_rows computes
  ShareRow* share_row;  // nullptr where a row belongs to one thread

  // Whether more than the target's element needs its own coefficient, or the logits a function of their own.
  TSE_HOST_DEVICE bool is_general() const {
    return label_smoothing != 0 || probabilities != nullptr || transform.softcap > 0;
  }
};

// What the target's class has beside what all classes have; A is row_loss' type.
template <class A>
TSE_HOST_DEVICE inline A weight_of(const CrossEntropyParams& p, int64_t target) {
  if (p.target == nullptr) return 0;
  const A w = p.weight == nullptr ? A(1) : static_cast<const A*>(p.weight)[target];
  return w * A(1 - p.label_smoothing);
}

// What a row's gradient is made of: with `own` and `others` the target's weights t of the own class and of all others,
//   grad_s / temperature = p · (target · (own + others) + lse) - t · target.
struct GradFactors {
  double target;
  double lse;

  // Of p alone.
  TSE_HOST_DEVICE double level(double own, double others) const { return target * (own + others) + lse; }
  // The gradient at the own class, of probability p = 1 - q.
  TSE_HOST_DEVICE double at_own(double own, double others, double p, double q) const {
    return (target * others + lse) * p - target * own * q;
  }
};
// What grad_output is to a row, divided for the mean and by the temperature: of the target's part of the loss, and of
// the z-loss for an lse of 1. CUDA: once a block, if it is the same for all rows, as GPUs divide few doubles.
struct RowGradOutput {
  double target;
  double z;
};
template <class A>
TSE_HOST_DEVICE inline RowGradOutput row_grad_output(const CrossEntropyParams& p, double grad, const double* divisors) {
  const bool mean = p.reduction == Reduction::kMean;
  const double temperature = p.transform.temperature;
  RowGradOutput g = {double(A(mean ? grad / divisors[0] : grad)), 0};
  if (p.z_loss_weight != 0) g.z = 2 * p.z_loss_weight * (mean ? grad / divisors[1] : grad);
  if (temperature != 1) g = {g.target / temperature, g.z / temperature};
  return g;
}
// lse: of the row; only with z_loss_weight.
template <class A>
TSE_HOST_DEVICE inline GradFactors grad_factors(const CrossEntropyParams& p, int64_t row, double lse,
                                                const RowGradOutput& g) {
  GradFactors f = {g.target, p.z_loss_weight != 0 ? g.z * lse : 0};
  if (p.grad_lse != nullptr) f.lse += double(static_cast<const A*>(p.grad_lse)[row]) / p.transform.temperature;
  return f;
}
template <class A>
TSE_HOST_DEVICE inline GradFactors grad_factors(const CrossEntropyParams& p, int64_t row, double lse) {
  const double grad = static_cast<const A*>(p.grad_output)[row * p.grad_output_stride];
  return grad_factors<A>(p, row, lse, row_grad_output<A>(p, grad, p.total_weight));
}

// CPU: forward, backward or both of rows [begin, end), whose targets were checked. Both make a row's gradient while its
// logits, or the terms of its sum, are in cache.
void cross_entropy_rows(const CrossEntropyParams& p, int64_t begin, int64_t end);

// CUDA: all rows, on `stream`, no synchronisation. A target outside [0, n) trips a device-side assertion. Forward
// writes grad_input, too, unless `assumed` is kNone. rescale multiplies it by grad_output / guess.
TSE_CUDA void launch_cross_entropy_fwd(const CrossEntropyParams& p, cudaStream_t stream);
TSE_CUDA void launch_cross_entropy_bwd(const CrossEntropyParams& p, cudaStream_t stream);
TSE_CUDA void launch_cross_entropy_rescale(const CrossEntropyParams& p, cudaStream_t stream);
TSE_CUDA int64_t cross_entropy_scratch(const CrossEntropyParams& p);  // bytes that forward needs
CrossEntropyState* cross_entropy_state(cudaStream_t stream);  // nullptr: none left

}  // namespace tse
