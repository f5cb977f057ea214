// Autograd and autocast of linear cross-entropy. [torch]
//
// Forward computes the gradients, for a grad_output of 1; backward scales them. Double backward, torch.func and
// forward-mode AD go through a linear layer and cross_entropy.
#include <ATen/SavedTensorHooks.h>
#include <ATen/TensorOperators.h>
#include <ATen/autocast_mode.h>
#include <ATen/ops/linear.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <array>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "common/autograd.h"
#include "common/python.h"
#include "linear_cross_entropy/linear_cross_entropy_host.h"

namespace tse {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using Options = LinearCrossEntropyOptions;

at::Tensor linear_cross_entropy(const at::Tensor& input, const at::Tensor& linear_weight, const at::Tensor& target,
                                const Options& options) {
  return std::get<0>(linear_cross_entropy_forward(input, linear_weight, target, {options, Wanted{}}));
}

std::pair<at::Tensor, variable_list> call_forward(const at::Tensor& input, const at::Tensor& linear_weight,
                                                  const at::Tensor& target, const Options& options, Wanted wanted) {
  auto [loss, of_input, of_weight, of_bias] = Operator<linear_cross_entropy_forward>::call(
      input, linear_weight, target, LinearGradientOptions{options, wanted});
  return {loss, {of_input, of_weight, of_bias}};
}

// All logits at once; differentiable any number of times.
at::Tensor composed(const at::Tensor& input, const at::Tensor& linear_weight, const at::Tensor& target,
                    const Options& options) {
  check_linear_cross_entropy(input, linear_weight, target, options);
  const CrossEntropyOptions& o = options.loss;
  const auto sizes = input.sym_sizes().slice(0, input.dim() - 1);
  const c10::SymInt rows = c10::multiply_integers(sizes);
  const at::Tensor logits = at::linear(input.reshape_symint({rows, input.sym_size(-1)}), linear_weight, options.bias);
  const at::Tensor t = target.is_floating_point() ? target.reshape_symint({rows, linear_weight.sym_size(0)})
                                                  : target.reshape_symint({rows});
  const at::Tensor loss = Operator<cross_entropy>::dispatch(logits, t, o);
  return o.reduction == "none" ? loss.reshape_symint(sizes) : loss;
}

// `gradient`, computed for a grad_output of 1, for `g`; in the same memory if that is owned.
at::Tensor scaled(const at::Tensor& gradient, const at::Tensor& g, at::ScalarType type, bool is_owned) {
  if (!is_owned || !is_plain(g)) return (gradient * g).to(type);
  if (!is_plain_cpu(g)) return gradient.mul_(g).to(type);  // without waiting for the device
  const double factor = g.item<double>();
  return (factor == 1 ? gradient : gradient.mul_(factor)).to(type);
}

constexpr const char* kGradients[] = {"grad_input", "grad_weight", "grad_bias"};

struct LinearCrossEntropy : torch::autograd::Function<LinearCrossEntropy> {
  static constexpr bool is_traceable = true;

  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& input, const at::Tensor& linear_weight,
                            const OptionalTensor& linear_bias, const at::Tensor& target, const Options& options) {
    const Wanted wanted{input.requires_grad(), linear_weight.requires_grad(),
                        linear_bias.has_value() && linear_bias->requires_grad()};
    // Backward computes the gradients where each row has its own grad_output, and under saved-tensor hooks:
    // checkpointing would keep what it is there to drop.
    const bool hooks = !at::SavedTensorDefaultHooks::get_tls_state().stack.empty();
    const bool in_forward = options.loss.reduction != "none" && !hooks;
    auto [loss, gradients] = call_forward(input, linear_weight, target, options, in_forward ? wanted : Wanted{});
    variable_list saved = {input, linear_weight, target, linear_bias.value_or(at::Tensor()),
                           options.loss.weight.value_or(at::Tensor())};
    if (in_forward && !is_plain(input)) {  // a tracer wants to know what goes from forward to backward
      saved.insert(saved.end(), gradients.begin(), gradients.end());
    } else if (in_forward) {
      for (size_t i = 0; i < 3; ++i) ctx->saved_data[kGradients[i]] = gradients[i];
    }
    ctx->save_for_backward(std::move(saved));
    ctx->saved_data["options"] = options.loss.saved();
    ctx->saved_data["chunk_size"] = options.chunk_size;
    return loss;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grad_outputs) {
    const auto saved = ctx->get_saved_variables();
    const at::Tensor &input = saved[0], &linear_weight = saved[1], &target = saved[2], &g = grad_outputs[0];
    Options options{{}, CrossEntropyOptions::from_saved(ctx->saved_data["options"], saved[4]), {}};
    if (saved[3].defined()) options.bias = saved[3];
    if (const c10::IValue& size = ctx->saved_data["chunk_size"]; !size.isNone()) options.chunk_size = size.toSymInt();
    const Wanted wanted{ctx->needs_input_grad(0), ctx->needs_input_grad(1),
                        saved[3].defined() && ctx->needs_input_grad(2)};
    const std::array<bool, 3> wants = {wanted.input, wanted.weight, wanted.bias};
    const std::array<at::Tensor, 3> of = {input, linear_weight, saved[3]};
    if (c10::GradMode::is_enabled()) {  // somebody will differentiate these gradients
      variable_list gradients(3);
      for (size_t i = 0; i < 3; ++i)
        if (wants[i]) gradients[i] = of[i];
      gradients = differentiable_gradients({composed(input, linear_weight, target, options)}, {g}, gradients);
      gradients.resize(5);
      return gradients;
    }
    const bool by_rows = options.loss.reduction == "none";
    bool is_owned = is_plain(input);
    variable_list gradients;
    if (by_rows) {
      const LinearGradientOptions all{options, wanted};
      const auto [of_input, of_weight, of_bias] =
          Operator<linear_cross_entropy_backward>::call(g, input, linear_weight, target, all);
      gradients = {of_input, of_weight, of_bias};
    } else if (saved.size() > 5) {
      gradients.assign(saved.begin() + 5, saved.end());
      is_owned = false;
    } else if (ctx->saved_data.count(kGradients[0]) != 0) {
      for (const char* name : kGradients) {  // given away once: whoever gets them may change them
        gradients.push_back(ctx->saved_data[name].toTensor());
        ctx->saved_data.erase(name);
      }
    } else {
      gradients = call_forward(input, linear_weight, target, options, wanted).second;
    }
    variable_list result(5);
    for (size_t i = 0; i < 3; ++i) {
      if (!wants[i]) continue;
      const auto type = of[i].scalar_type();
      result[i] = by_rows ? gradients[i].to(type) : scaled(gradients[i], g, type, is_owned);
    }
    return result;
  }
};

at::Tensor linear_cross_entropy_autograd(const at::Tensor& input, const at::Tensor& linear_weight,
                                         const at::Tensor& target, const Options& options) {
  // The gradients of class probabilities and of class weights need all logits.
  if (wants_weight_gradient("linear_cross_entropy", target, options.loss.weight) ||
      gradient_path(target) != GradientPath::kNone)
    return composed(input, linear_weight, target, options);
  const std::array<GradientPath, 3> paths = {
      gradient_path(input), gradient_path(linear_weight),
      options.bias.has_value() ? gradient_path(*options.bias) : GradientPath::kNone};
  const auto any = [&](GradientPath path) { return paths[0] == path || paths[1] == path || paths[2] == path; };
  if (any(GradientPath::kComposed)) return composed(input, linear_weight, target, options);
  if (any(GradientPath::kFused)) return LinearCrossEntropy::apply(input, linear_weight, options.bias, target, options);
  return Operator<linear_cross_entropy>::call(input, linear_weight, target, options);
}

// As torch's linear: the matrix products run in the dtype of autocast. The loss stays in float32.
template <c10::DeviceType kDevice>
at::Tensor linear_cross_entropy_autocast(const at::Tensor& input, const at::Tensor& linear_weight,
                                         const at::Tensor& target, const Options& options) {
  const auto key = kDevice == c10::DeviceType::CUDA ? c10::DispatchKey::AutocastCUDA : c10::DispatchKey::AutocastCPU;
  const c10::impl::ExcludeDispatchKeyGuard below_autocast(key);
  const auto type = at::autocast::get_autocast_dtype(kDevice);
  const auto cast = [&](const at::Tensor& t) { return at::autocast::cached_cast(type, t, kDevice); };
  Options o = options;
  if (o.bias.has_value()) o.bias = cast(*o.bias);
  return Operator<linear_cross_entropy>::dispatch(cast(input), cast(linear_weight), target, o);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(torch_softmax_ext, m) {
  const std::string options = Options::schema();
  define_public<linear_cross_entropy, linear_cross_entropy_autograd>(
      m, "linear_cross_entropy", "(Tensor input, Tensor linear_weight, Tensor target, " + options + ") -> Tensor");
  implement<linear_cross_entropy_autocast<c10::DeviceType::CPU>>(m, "linear_cross_entropy",
                                                                 c10::DispatchKey::AutocastCPU);
  implement<linear_cross_entropy_autocast<c10::DeviceType::CUDA>>(m, "linear_cross_entropy",
                                                                  c10::DispatchKey::AutocastCUDA);
  const std::string arguments = "Tensor input, Tensor linear_weight, Tensor target, " + without_defaults(options) +
                                ", bool grad_input, bool grad_weight, bool grad_bias) -> ";
  const std::string gradients = "Tensor grad_input, Tensor grad_weight, Tensor grad_bias)";
  define<linear_cross_entropy_forward>(m, "_linear_cross_entropy_forward",
                                       "(" + arguments + "(Tensor loss, " + gradients);
  define<linear_cross_entropy_backward>(m, "_linear_cross_entropy_backward",
                                        "(Tensor grad_output, " + arguments + "(" + gradients);
}

}  // namespace tse
