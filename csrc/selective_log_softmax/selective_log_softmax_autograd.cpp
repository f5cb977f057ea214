// Autograd and autocast of selective log-softmax. [torch]
//
// The fused operators give the first derivative; where somebody differentiates further or in another mode, torch's own
// composition takes their place.
#include <ATen/TensorOperators.h>
#include <ATen/ops/logsumexp.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <limits>
#include <optional>
#include <tuple>

#include "common/autograd.h"

namespace tse {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using OptionalTensor = std::optional<at::Tensor>;
using TwoTensors = std::tuple<at::Tensor, at::Tensor>;
using ThreeTensors = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

ThreeTensors call_forward(const at::Tensor& input, const at::Tensor& index, double temperature,
                          std::optional<double> softcap, bool entropy) {
  static const auto op =
      find_op<ThreeTensors(const at::Tensor&, const at::Tensor&, double, std::optional<double>, bool)>(
          "torch_softmax_ext::_selective_log_softmax_forward");
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  return op.call(input, index, temperature, softcap, entropy);
}

template <class Result>
Result call_public(const char* name, const at::Tensor& input, const at::Tensor& index, double temperature,
                   std::optional<double> softcap) {
  static const auto op = find_op<Result(const at::Tensor&, const at::Tensor&, double, std::optional<double>)>(name);
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  return op.call(input, index, temperature, softcap);
}

at::Tensor call_backward(const OptionalTensor& grad_logp, const OptionalTensor& grad_entropy, const at::Tensor& input,
                         const at::Tensor& index, const at::Tensor& stats, double temperature,
                         std::optional<double> softcap) {
  static const auto op = find_op<at::Tensor(const OptionalTensor&, const OptionalTensor&, const at::Tensor&,
                                            const at::Tensor&, const at::Tensor&, double, std::optional<double>)>(
      "torch_softmax_ext::_selective_log_softmax_backward");
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  return op.call(grad_logp, grad_entropy, input, index, stats, temperature, softcap);
}

// {log-probabilities}, or {log-probabilities, entropy}.
variable_list composed(const at::Tensor& input, const at::Tensor& index, double temperature,
                       std::optional<double> softcap, bool entropy) {
  at::Tensor s = input.to(input.scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
  if (softcap.has_value()) s = (s / *softcap).tanh() * *softcap;
  if (temperature != 1) s = s / temperature;
  const bool one = index.dim() < input.dim();
  const at::Tensor i = (one ? index.unsqueeze(-1) : index).to(at::kLong);
  const at::Tensor lse = at::logsumexp(s, -1, /*keepdim=*/true);
  const at::Tensor at_index = s.gather(-1, i) - lse;
  variable_list r = {one ? at_index.squeeze(-1) : at_index};
  if (entropy) {
    const at::Tensor logp = s - lse;
    const at::Tensor finite = logp.masked_fill(logp == -std::numeric_limits<double>::infinity(), 0);  // 0 · log 0 = 0
    r.push_back(-(logp.exp() * finite).sum(-1));
  }
  return r;
}

struct SelectiveLogSoftmax : torch::autograd::Function<SelectiveLogSoftmax> {
  static constexpr bool is_traceable = true;

  static variable_list forward(AutogradContext* ctx, const at::Tensor& input, const at::Tensor& index,
                               double temperature, std::optional<double> softcap, bool entropy) {
    const auto [logp, h, stats] = call_forward(input, index, temperature, softcap, entropy);
    ctx->save_for_backward({input, index, stats});
    ctx->saved_data["temperature"] = temperature;
    ctx->saved_data["softcap"] = softcap;
    ctx->saved_data["entropy"] = entropy;
    ctx->set_materialize_grads(false);
    return entropy ? variable_list{logp, h} : variable_list{logp};
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    const at::Tensor &input = saved[0], &index = saved[1];
    const double temperature = ctx->saved_data["temperature"].toDouble();
    const auto softcap = ctx->saved_data["softcap"].toOptional<double>();
    const bool entropy = ctx->saved_data["entropy"].toBool();
    if (entropy && !grads[0].defined() && !grads[1].defined()) return {{}, {}, {}, {}, {}};
    if (!entropy && !grads[0].defined()) return {{}, {}, {}, {}, {}};
    if (at::GradMode::is_enabled()) {  // somebody will differentiate this gradient
      const variable_list all = composed(input, index, temperature, softcap, entropy);
      variable_list outputs, incoming;
      for (size_t i = 0; i < grads.size(); ++i) {
        if (!grads[i].defined()) continue;
        outputs.push_back(all[i]);
        incoming.push_back(grads[i]);
      }
      const variable_list g =
          torch::autograd::grad(outputs, {input}, incoming, /*retain_graph=*/true, /*create_graph=*/true);
      return {g[0], {}, {}, {}, {}};
    }
    OptionalTensor grad_logp, grad_entropy;
    if (grads[0].defined()) grad_logp = grads[0];
    if (entropy && grads[1].defined()) grad_entropy = grads[1];
    return {call_backward(grad_logp, grad_entropy, input, index, saved[2], temperature, softcap), {}, {}, {}, {}};
  }
};

at::Tensor selective_log_softmax_autograd(const at::Tensor& input, const at::Tensor& index, double temperature,
                                          std::optional<double> softcap) {
  switch (gradient_path(input)) {
    case GradientPath::kFused:
      return SelectiveLogSoftmax::apply(input, index, temperature, softcap, false)[0];
    case GradientPath::kComposed:
      return composed(input, index, temperature, softcap, false)[0];
    default:
      return call_public<at::Tensor>("torch_softmax_ext::selective_log_softmax", input, index, temperature, softcap);
  }
}

TwoTensors selective_log_softmax_with_entropy_autograd(const at::Tensor& input, const at::Tensor& index,
                                                       double temperature, std::optional<double> softcap) {
  variable_list r;
  switch (gradient_path(input)) {
    case GradientPath::kFused:
      r = SelectiveLogSoftmax::apply(input, index, temperature, softcap, true);
      break;
    case GradientPath::kComposed:
      r = composed(input, index, temperature, softcap, true);
      break;
    default:
      return call_public<TwoTensors>("torch_softmax_ext::selective_log_softmax_with_entropy", input, index, temperature,
                                     softcap);
  }
  return {r[0], r[1]};
}

}  // namespace

TORCH_LIBRARY_IMPL(torch_softmax_ext, Autograd, m) {
  m.impl("selective_log_softmax", selective_log_softmax_autograd);
  m.impl("selective_log_softmax_with_entropy", selective_log_softmax_with_entropy_autograd);
}

// Under autocast the logits stay as they are: the kernels compute in fp32 and return fp32, so no upcast copy.
TORCH_LIBRARY_IMPL(torch_softmax_ext, AutocastCPU, m) {
  m.impl("selective_log_softmax", torch::CppFunction::makeFallthrough());
  m.impl("selective_log_softmax_with_entropy", torch::CppFunction::makeFallthrough());
}
TORCH_LIBRARY_IMPL(torch_softmax_ext, AutocastCUDA, m) {
  m.impl("selective_log_softmax", torch::CppFunction::makeFallthrough());
  m.impl("selective_log_softmax_with_entropy", torch::CppFunction::makeFallthrough());
}

}  // namespace tse
