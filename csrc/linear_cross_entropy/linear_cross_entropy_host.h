// What host entries and autograd of linear cross-entropy share. [torch]
#pragma once
#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

#include "cross_entropy/cross_entropy_host.h"

namespace tse {

// The arguments of the schemas after input, linear_weight and target.
struct LinearCrossEntropyOptions {
  OptionalTensor bias;
  CrossEntropyOptions loss;
  std::optional<c10::SymInt> chunk_size;

  static std::string schema() {
    return std::string("Tensor? linear_bias=None, ") + CrossEntropyOptions::kSchema + ", SymInt? chunk_size=None";
  }
  auto fields() const { return std::tuple_cat(std::tie(bias), loss.fields(), std::tie(chunk_size)); }
};

// The gradients that somebody asked for.
struct Wanted {
  bool input = false, weight = false, bias = false;
  bool any() const { return input || weight || bias; }
};

struct LinearGradientOptions {
  LinearCrossEntropyOptions options;
  Wanted wanted;

  auto fields() const { return std::tuple_cat(options.fields(), std::tie(wanted.input, wanted.weight, wanted.bias)); }
};

// Reads no memory; sizes may be symbolic.
void check_linear_cross_entropy(const at::Tensor& input, const at::Tensor& linear_weight, const at::Tensor& target,
                                const LinearCrossEntropyOptions& options);

// ---- kernels of the operators ---------------------------------------------------------------------------------------

// Loss, then the gradients of input, weight and bias for a grad_output of 1.
using LossAndGradients = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
LossAndGradients linear_cross_entropy_forward(const at::Tensor& input, const at::Tensor& linear_weight,
                                              const at::Tensor& target, const LinearGradientOptions& options);

using ThreeGradients = std::tuple<at::Tensor, at::Tensor, at::Tensor>;
ThreeGradients linear_cross_entropy_backward(const at::Tensor& grad_output, const at::Tensor& input,
                                             const at::Tensor& linear_weight, const at::Tensor& target,
                                             const LinearGradientOptions& options);

}  // namespace tse
