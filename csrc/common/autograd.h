// How a call is differentiated, and what compositions of torch's operators share: they take the place of the fused ones
// where somebody differentiates twice, in forward mode or in torch.func. [torch]
#pragma once
#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>
#include <c10/core/GradMode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/custom_function.h>

#include <optional>

#include "common/host.h"
#include "common/operator.h"

namespace tse {

enum class GradientPath {
  kNone,  // nobody asks for a gradient
  kFused,  // the first derivative by the fused backward: torch::autograd::Function
  kComposed,  // torch.func transforms and forward-mode AD, which a C++ Function cannot be part of
};

inline bool needs_grad(const at::Tensor& t) { return t.requires_grad(); }
inline bool needs_grad(const OptionalTensor& t) { return t.has_value() && t->requires_grad(); }
inline bool is_dual(const at::Tensor& t) { return t._fw_grad(/*level=*/0).defined(); }
inline bool is_dual(const OptionalTensor& t) { return t.has_value() && is_dual(*t); }

template <class... Tensors>
GradientPath gradient_path(const Tensors&... inputs) {
  const bool any_grad = c10::GradMode::is_enabled() && (needs_grad(inputs) || ...), any_dual = (is_dual(inputs) || ...);
  if (!any_grad && !any_dual) return GradientPath::kNone;
  const bool in_functorch =
      c10::impl::tls_local_dispatch_key_set().included_.has(c10::DispatchKey::FuncTorchDynamicLayerFrontMode);
  return any_dual || in_functorch ? GradientPath::kComposed : GradientPath::kFused;
}

inline bool is_plain_cuda(const at::Tensor& t) { return use_cuda(t) && is_plain(t); }

// Its values may be looked at, too.
inline bool is_plain_cpu(const at::Tensor& t) { return t.is_cpu() && !use_cuda(t) && is_plain(t); }

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
