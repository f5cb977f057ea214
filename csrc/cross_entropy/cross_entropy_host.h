// What the host files of cross-entropy, and of those that build on it, know of each other. [torch]
#pragma once
#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>
#include <utility>

namespace tse {

struct CrossEntropyParams;

using OptionalTensor = std::optional<at::Tensor>;

// The arguments of the schema behind input and target.
struct CrossEntropyOptions {
  OptionalTensor weight;
  int64_t ignore_index = -100;
  std::string_view reduction = "mean";
  double label_smoothing = 0;
  double z_loss_weight = 0;
  std::optional<double> softcap;
  double temperature = 1;
};

// The arguments of the schemas behind input and target.
#define TSE_OPTIONS                                                                                       \
  const OptionalTensor &weight, int64_t ignore_index, std::string_view reduction, double label_smoothing, \
      double z_loss_weight, std::optional<double> softcap, double temperature
#define TSE_PACKED \
  CrossEntropyOptions { weight, ignore_index, reduction, label_smoothing, z_loss_weight, softcap, temperature }
#define TSE_UNPACKED(o) \
  (o).weight, (o).ignore_index, (o).reduction, (o).label_smoothing, (o).z_loss_weight, (o).softcap, (o).temperature

// Raises in the name of operator `op`. torch takes integer weights with class probabilities alone.
void check_options(const char* op, const at::Tensor& input, const c10::SymInt& classes,
                   const CrossEntropyOptions& options, bool probabilities);

// The dtype of a target that is not class probabilities.
void check_index_dtype(const char* op, const at::Tensor& target);

// Class indices as the kernels read them: int32 or int64.
inline at::Tensor class_indices(const at::Tensor& target) {
  return target.scalar_type() == at::kByte ? target.to(at::kInt) : target;
}

// For autograd entries (below them gradients are off): whether a gradient of the class weights is asked for, which is
// computed with class probabilities alone.
bool wants_weight_gradient(const char* op, const at::Tensor& target, const OptionalTensor& weight);

// Raises what torch.nn.functional.cross_entropy would. Reads no memory; sizes may be symbolic.
void check_cross_entropy(const at::Tensor& input, const at::Tensor& target, const CrossEntropyOptions& options);

// Raises where the gradient cannot take the memory of the logits: elements that may share it, or another argument in
// it.
void check_writable(const at::Tensor& input, const at::Tensor& target, const CrossEntropyOptions& options);

// CPU: raises IndexError for a target that is neither a class nor ignore_index. Class probabilities are let through.
void check_target_range(const at::Tensor& input, const at::Tensor& target, int64_t ignore_index);

// Logits and class probabilities of two dtypes are computed in the wider one, as torch does.
inline bool needs_promotion(const at::Tensor& input, const at::Tensor& target) {
  return target.is_floating_point() && input.is_floating_point() && target.scalar_type() != input.scalar_type();
}
std::pair<at::Tensor, at::Tensor> promoted(const at::Tensor& input, const at::Tensor& target);

// CPU, all rows on torch's threads. Forward raises for a target that is no class before anything is written.
void run_cross_entropy_fwd(const CrossEntropyParams& p, bool with_gradient);
void run_cross_entropy_bwd(const CrossEntropyParams& p);

// What autograd calls without the dispatcher, for plain tensors in eager mode.
struct CrossEntropyResult {
  at::Tensor loss;
  at::Tensor stats;       // what backward needs of each row beside the logits
  at::Tensor grad_input;  // of cross_entropy_forward_backward
  at::Tensor z_loss, predictions;
};

// The loss alone.
at::Tensor cross_entropy_loss(const at::Tensor& input, const at::Tensor& target, const CrossEntropyOptions& options);

// The gradient from what forward made and checked; nothing is checked again.
at::Tensor cross_entropy_gradient(const at::Tensor& grad_output, const OptionalTensor& grad_lse,
                                  const at::Tensor& input, const at::Tensor& target, const at::Tensor& stats,
                                  const CrossEntropyOptions& options);

// Loss and gradient in one go, for an incoming gradient that is known beforehand (of every row for "none"); in_place:
// the gradient takes the memory of the logits. On CUDA nullopt leaves it to the device to guess, for mean and sum; then
// grad_input is only for one of the next two, which compare on the device. It is undefined where it had to be copied.
CrossEntropyResult cross_entropy_forward_backward(const at::Tensor& input, const at::Tensor& target,
                                                  const CrossEntropyOptions& options, std::optional<double> grad_output,
                                                  bool in_place);

// The gradient, in the memory of `written`, which is right already where the guess was.
at::Tensor cross_entropy_backward_after_guess(const at::Tensor& written, const at::Tensor& grad_output,
                                              const at::Tensor& input, const at::Tensor& target,
                                              const at::Tensor& stats, const CrossEntropyOptions& options);

// The same for logits that `written` has taken the place of: a multiplication where the guess was wrong.
void cross_entropy_rescale(const at::Tensor& written, const at::Tensor& grad_output, const at::Tensor& stats,
                           std::string_view reduction);

}  // namespace tse
