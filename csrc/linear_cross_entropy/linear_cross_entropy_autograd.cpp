// Autograd and autocast of linear cross-entropy. [torch]
//
// The first derivative comes out of the forward pass, for an incoming gradient of 1. Where somebody differentiates
// further or in another mode (double backward, torch.func, forward-mode AD), it is a linear layer and cross_entropy.
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
#include "linear_cross_entropy/linear_cross_entropy_host.h"

namespace tse {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using Options = LinearCrossEntropyOptions;

using Operator = at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&, TSE_LINEAR_OPTIONS);

const c10::TypedOperatorHandle<Operator>& linear_cross_entropy_op() {
  static const auto op = find_op<Operator>("torch_softmax_ext::linear_cross_entropy");
  return op;
}

std::pair<at::Tensor, variable_list> call_forward(const at::Tensor& input, const at::Tensor& linear_weight,
                                                  const at::Tensor& target, const Options& options, Wanted wanted) {
  static const auto op = find_op<std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>(
      const at::Tensor&, const at::Tensor&, const at::Tensor&, TSE_LINEAR_OPTIONS, bool, bool, bool)>(
      "torch_softmax_ext::_linear_cross_entropy_forward");
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  auto [loss, of_input, of_weight, of_bias] =
      op.call(input, linear_weight, target, TSE_LINEAR_UNPACKED(options), wanted.input, wanted.weight, wanted.bias);
  return {loss, {of_input, of_weight, of_bias}};
}

variable_list call_backward(const at::Tensor& grad_output, const at::Tensor& input, const at::Tensor& linear_weight,
                            const at::Tensor& target, const Options& options, Wanted wanted) {
  static const auto op =
      find_op<std::tuple<at::Tensor, at::Tensor, at::Tensor>(const at::Tensor&, const at::Tensor&, const at::Tensor&,
                                                             const at::Tensor&, TSE_LINEAR_OPTIONS, bool, bool, bool)>(
          "torch_softmax_ext::_linear_cross_entropy_backward");
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  auto [of_input, of_weight, of_bias] = op.call(grad_output, input, linear_weight, target, TSE_LINEAR_UNPACKED(options),
                                                wanted.input, wanted.weight, wanted.bias);
  return {of_input, of_weight, of_bias};
}

// All logits at once; differentiable any number of times.
at::Tensor composed(const at::Tensor& input, const at::Tensor& linear_weight, const at::Tensor& target,
                    const Options& options) {
  static const auto op =
      find_op<at::Tensor(const at::Tensor&, const at::Tensor&, const OptionalTensor&, int64_t, std::string_view, double,
                         double, std::optional<double>, double)>("torch_softmax_ext::cross_entropy");
  check_linear_cross_entropy(input, linear_weight, target, options);
  const CrossEntropyOptions& o = options.loss;
  const auto sizes = input.sym_sizes().slice(0, input.dim() - 1);
  const c10::SymInt rows = c10::multiply_integers(sizes);
  const at::Tensor logits = at::linear(input.reshape_symint({rows, input.sym_size(-1)}), linear_weight, options.bias);
  const at::Tensor t = target.is_floating_point() ? target.reshape_symint({rows, linear_weight.sym_size(0)})
                                                  : target.reshape_symint({rows});
  const at::Tensor loss = op.call(logits, t, o.weight, o.ignore_index, o.reduction, o.label_smoothing, o.z_loss_weight,
                                  o.softcap, o.temperature);
  return o.reduction == "none" ? loss.reshape_symint(sizes) : loss;
}

// The gradient of a loss whose incoming gradient is `g`, from that for 1, whose memory it may take if that is owned.
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
    // Backward computes the gradients where rows have an incoming gradient each, and under saved-tensor hooks:
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
    const CrossEntropyOptions& o = options.loss;
    ctx->saved_data["reduction"] = std::string(o.reduction);
    ctx->saved_data["options"] = std::make_tuple(o.ignore_index, o.label_smoothing, o.z_loss_weight, o.softcap,
                                                 o.temperature, options.chunk_size);
    return loss;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grad_outputs) {
    const auto saved = ctx->get_saved_variables();
    const at::Tensor &input = saved[0], &linear_weight = saved[1], &target = saved[2], &g = grad_outputs[0];
    const Options options = saved_options(ctx, saved[3], saved[4]);
    const Wanted wanted{ctx->needs_input_grad(0), ctx->needs_input_grad(1),
                        saved[3].defined() && ctx->needs_input_grad(2)};
    const std::array<bool, 3> wants = {wanted.input, wanted.weight, wanted.bias};
    const std::array<at::Tensor, 3> of = {input, linear_weight, saved[3]};
    variable_list result(5);
    if (c10::GradMode::is_enabled()) {  // somebody will differentiate these gradients
      variable_list inputs;
      for (size_t i = 0; i < 3; ++i)
        if (wants[i]) inputs.push_back(of[i]);
      variable_list gradients = torch::autograd::grad({composed(input, linear_weight, target, options)}, inputs, {g},
                                                      /*retain_graph=*/true, /*create_graph=*/true);
      for (size_t i = 0, next = 0; i < 3; ++i)
        if (wants[i]) result[i] = gradients[next++];
      return result;
    }
    const bool by_rows = options.loss.reduction == "none";
    bool is_owned = is_plain(input);
    variable_list gradients;
    if (by_rows) {
      gradients = call_backward(g, input, linear_weight, target, options, wanted);
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
    for (size_t i = 0; i < 3; ++i) {
      if (!wants[i]) continue;
      const auto type = of[i].scalar_type();
      result[i] = by_rows ? gradients[i].to(type) : scaled(gradients[i], g, type, is_owned);
    }
    return result;
  }

 private:
  static Options saved_options(AutogradContext* ctx, const at::Tensor& linear_bias, const at::Tensor& weight) {
    const std::vector<c10::IValue> o = ctx->saved_data["options"].toTuple()->elements().vec();
    Options options;
    if (linear_bias.defined()) options.bias = linear_bias;
    if (weight.defined()) options.loss.weight = weight;
    options.loss.reduction = ctx->saved_data["reduction"].toStringView();
    options.loss.ignore_index = o[0].toInt();
    options.loss.label_smoothing = o[1].toDouble();
    options.loss.z_loss_weight = o[2].toDouble();
    options.loss.softcap = o[3].toOptional<double>();
    options.loss.temperature = o[4].toDouble();
    if (!o[5].isNone()) options.chunk_size = o[5].toSymInt();
    return options;
  }
};

at::Tensor linear_cross_entropy_autograd(const at::Tensor& input, const at::Tensor& linear_weight,
                                         const at::Tensor& target, TSE_LINEAR_OPTIONS) {
  const Options options = TSE_LINEAR_PACKED;
  // The gradients of class probabilities and of class weights need all logits.
  if (wants_weight_gradient("linear_cross_entropy", target, weight) || gradient_path(target) != GradientPath::kNone)
    return composed(input, linear_weight, target, options);
  const std::array<GradientPath, 3> paths = {
      gradient_path(input), gradient_path(linear_weight),
      linear_bias.has_value() ? gradient_path(*linear_bias) : GradientPath::kNone};
  const auto any = [&](GradientPath path) { return paths[0] == path || paths[1] == path || paths[2] == path; };
  if (any(GradientPath::kComposed)) return composed(input, linear_weight, target, options);
  if (any(GradientPath::kFused)) return LinearCrossEntropy::apply(input, linear_weight, linear_bias, target, options);
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  return linear_cross_entropy_op().call(input, linear_weight, target, TSE_LINEAR_UNPACKED(options));
}

// As torch's linear: the matrix products run in the dtype of autocast. The loss stays in float32.
template <c10::DeviceType kDevice>
at::Tensor linear_cross_entropy_autocast(const at::Tensor& input, const at::Tensor& linear_weight,
                                         const at::Tensor& target, TSE_LINEAR_OPTIONS) {
  const auto key = kDevice == c10::DeviceType::CUDA ? c10::DispatchKey::AutocastCUDA : c10::DispatchKey::AutocastCPU;
  const c10::impl::ExcludeDispatchKeyGuard below_autocast(key);
  const auto type = at::autocast::get_autocast_dtype(kDevice);
  const auto cast = [&](const at::Tensor& t) { return at::autocast::cached_cast(type, t, kDevice); };
  Options options = TSE_LINEAR_PACKED;
  if (options.bias.has_value()) options.bias = cast(*options.bias);
  return linear_cross_entropy_op().call(cast(input), cast(linear_weight), target, TSE_LINEAR_UNPACKED(options));
}

}  // namespace

TORCH_LIBRARY_IMPL(torch_softmax_ext, Autograd, m) { m.impl("linear_cross_entropy", linear_cross_entropy_autograd); }
TORCH_LIBRARY_IMPL(torch_softmax_ext, AutocastCPU, m) {
  m.impl("linear_cross_entropy", linear_cross_entropy_autocast<c10::DeviceType::CPU>);
}
TORCH_LIBRARY_IMPL(torch_softmax_ext, AutocastCUDA, m) {
  m.impl("linear_cross_entropy", linear_cross_entropy_autocast<c10::DeviceType::CUDA>);
}

}  // namespace tse
