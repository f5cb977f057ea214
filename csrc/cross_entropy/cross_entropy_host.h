// Cross-entropy: the options, and what its host files and those of the linear loss share. [torch]
#pragma once
#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>
#include <tuple>
#include <utility>

#include "common/operator.h"
#include "common/targets.h"

namespace tse {

struct CrossEntropyParams;

// The arguments of the schemas after the tensors.
struct CrossEntropyOptions {
  OptionalTensor weight;
  int64_t ignore_index = -100;
  std::string_view reduction = "mean";
  double label_smoothing = 0;
  double z_loss_weight = 0;
  std::optional<double> softcap;
  double temperature = 1;

  static constexpr const char* kSchema =
      "Tensor? weight=None, *, int ignore_index=-100, str reduction=\"mean\", float label_smoothing=0.0, float "
      "z_loss_weight=0.0, float? softcap=None, float temperature=1.0";
  auto fields() const {
    return std::tie(weight, ignore_index, reduction, label_smoothing, z_loss_weight, softcap, temperature);
  }

  // What autograd keeps for backward: a tensor, and numbers.
  const OptionalTensor& tensor() const { return weight; }
  c10::IValue saved() const;
  static CrossEntropyOptions from_saved(const c10::IValue& saved, const at::Tensor& weight);
};

// Raises in the name of operator `op`. torch takes integer weights with class probabilities alone.
void check_options(const char* op, const at::Tensor& input, const c10::SymInt& classes,
                   const CrossEntropyOptions& options, bool probabilities);

// Whether a gradient of the class weights is asked for. Raises with class indices, as torch has none for them.
bool wants_weight_gradient(const char* op, const at::Tensor& target, const OptionalTensor& weight);

// Raises what torch.nn.functional.cross_entropy would. Reads no memory; sizes may be symbolic.
void check_cross_entropy(const at::Tensor& input, const at::Tensor& target, const CrossEntropyOptions& options);

// Raises where the gradient cannot take the memory of the logits: their elements, or another argument, share it.
void check_writable(const at::Tensor& input, const at::Tensor& target, const CrossEntropyOptions& options);

// CPU, on torch's threads: forward, backward or both of all rows; all of forward, with the gradient where wanted, for
// targets that were checked and counted (total_weight[1]).
void run_cross_entropy_rows(CrossEntropyParams p, bool forward, bool backward);
void run_cross_entropy_fwd(const CrossEntropyParams& p, bool with_gradient);

// ---- without the dispatcher, for plain tensors ----------------------------------------------------------------------

struct CrossEntropyResult {
  at::Tensor loss;
  at::Tensor stats;       // what backward needs beside the tensors of the call
  at::Tensor grad_input;  // of cross_entropy_forward_backward
  at::Tensor z_loss, predictions;
};

// Loss and gradient in one go, for a grad_output that is known beforehand (of every row for "none"); in_place: the
// gradient takes the memory of the logits. On CUDA nullopt leaves it to the device to guess, for mean and sum; then
// grad_input is only for one of the next two, which compare on the device. It is undefined where it had to be copied.
CrossEntropyResult cross_entropy_forward_backward(const at::Tensor& input, const at::Tensor& target,
                                                  const CrossEntropyOptions& options, std::optional<double> grad_output,
                                                  bool in_place);

// The gradient from what forward made and checked; nothing is checked again. CUDA: `written` is the gradient for the
// device's guess, whose memory it takes, and which stays as it is where the guess was right.
at::Tensor cross_entropy_gradient(const at::Tensor& grad_output, const OptionalTensor& grad_lse,
                                  const at::Tensor& input, const at::Tensor& target, const at::Tensor& stats,
                                  const CrossEntropyOptions& options, const at::Tensor& written = {});

// CUDA: the same for logits that `written` has taken the place of: a multiplication where the guess was wrong.
void cross_entropy_rescale(const at::Tensor& written, const at::Tensor& grad_output, const at::Tensor& stats,
                           std::string_view reduction);

// ---- kernels of the operators ---------------------------------------------------------------------------------------

std::tuple<at::Tensor, at::Tensor> cross_entropy_forward(const at::Tensor& input, const at::Tensor& target,
                                                         const CrossEntropyOptions& options);  // loss, stats
inline at::Tensor cross_entropy(const at::Tensor& input, const at::Tensor& target, const CrossEntropyOptions& options) {
  return std::get<0>(cross_entropy_forward(input, target, options));
}

// Loss, stats, z-loss, lse, accuracy, predictions. lse is 0 and predictions are ignore_index where a row is ignored.
using StatsAndMetrics = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
StatsAndMetrics cross_entropy_metrics_forward(const at::Tensor& input, const at::Tensor& target,
                                              const CrossEntropyOptions& options);

at::Tensor cross_entropy_backward(const at::Tensor& grad_output, const OptionalTensor& grad_lse,
                                  const at::Tensor& input, const at::Tensor& target, const at::Tensor& stats,
                                  const CrossEntropyOptions& options);

}  // namespace tse
