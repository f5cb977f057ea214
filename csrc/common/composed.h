// What compositions of torch's operators share: they take the place of the fused operators where somebody
// differentiates twice, in forward mode or in torch.func. [torch]
#pragma once
#include <ATen/TensorOperators.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/custom_function.h>

#include <optional>

#include "common/host.h"

namespace tse {

// The logits after softcap and temperature, in the dtype of the arithmetic.
inline at::Tensor transformed(const at::Tensor& input, const std::optional<double>& softcap, double temperature) {
  at::Tensor s = input.to(accumulate_type(input.scalar_type()));
  if (softcap.has_value()) s = (s / *softcap).tanh() * *softcap;
  return temperature == 1 ? s : s / temperature;
}

// The gradients at `inputs`, differentiable again. An undefined grad_output is 0; an undefined input has none.
inline torch::autograd::variable_list differentiable_gradients(const torch::autograd::variable_list& outputs,
                                                               const torch::autograd::variable_list& grad_outputs,
                                                               torch::autograd::variable_list inputs) {
  torch::autograd::variable_list differentiated, of_outputs, wanted;
  for (size_t i = 0; i < grad_outputs.size(); ++i) {
    if (!grad_outputs[i].defined()) continue;
    differentiated.push_back(outputs[i]);
    of_outputs.push_back(grad_outputs[i]);
  }
  for (const at::Tensor& input : inputs)
    if (input.defined()) wanted.push_back(input);
  const auto gradients = torch::autograd::grad(differentiated, wanted, of_outputs, /*retain_graph=*/true,
                                               /*create_graph=*/true, /*allow_unused=*/true);
  auto next = gradients.begin();
  for (at::Tensor& input : inputs)
    if (input.defined()) input = *next++;
  return inputs;
}

}  // namespace tse
