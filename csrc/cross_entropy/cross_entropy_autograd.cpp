// Autograd of cross-entropy: alone (the form of a loss, common/row_loss.h), with metrics, and in place; and the
// composition of torch's operators for double backward, torch.func and forward-mode AD. [torch]
#include <ATen/TensorOperators.h>
#include <ATen/ops/cross_entropy_loss.h>
#include <ATen/ops/log_softmax.h>
#include <ATen/ops/logsumexp.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <array>
#include <cmath>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "common/autograd.h"
#include "common/check.h"
#include "common/host.h"
#include "common/python.h"
#include "common/row_loss.h"
#include "cross_entropy/cross_entropy_host.h"

namespace tse {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

using Options = CrossEntropyOptions;

// ---- the same as a composition of torch's differentiable operators ------------------------------------------------

// {loss}, or {loss, z-loss in it, lse}. stats: of forward, where it ran.
variable_list composed(const at::Tensor& input, const at::Tensor& target, const Options& options, size_t count,
                       const at::Tensor& stats) {
  check_cross_entropy(input, target, options);
  const auto code = static_cast<int64_t>(parse_reduction("cross_entropy", options.reduction));
  const bool indices = !target.is_floating_point();
  at::Tensor x = input, t = target;
  if (indices) {
    // One row may have its target as () or as (1), which torch's own backward does not know.
    t = (input.dim() == 1 ? target.reshape({}) : target).to(at::kLong);
    // An ignored row's gradient is 0 even where its logits are not finite. The mask is a fifth of a small double
    // backward: not where stats are known to have counted every row.
    const bool all_count =
        stats.defined() && is_plain_cpu(stats) && is_plain_cpu(input) &&
        stats.const_data_ptr<double>()[1] * double(input.size(class_dim(input))) == double(input.numel());
    if (!all_count) x = x.masked_fill(t.eq(options.ignore_index).unsqueeze(class_dim(input)), 0);
  }
  const at::Tensor s = transformed(x, options.softcap, options.temperature);
  if (!indices) t = target.to(s.scalar_type());
  const auto weight = options.weight.has_value() ? OptionalTensor(options.weight->to(s.scalar_type())) : std::nullopt;
  at::Tensor loss = at::cross_entropy_loss(s, t, weight, code, options.ignore_index, options.label_smoothing);
  if (count == 1 && options.z_loss_weight == 0) return {loss};
  at::Tensor lse = at::logsumexp(s, class_dim(input));
  const at::Tensor counted = indices ? t != options.ignore_index : at::ones_like(lse, at::kBool);
  lse = lse.masked_fill(counted.logical_not(), 0);
  at::Tensor z_loss = lse * lse * options.z_loss_weight;
  if (code != at::Reduction::None) z_loss = z_loss.sum();
  if (code == at::Reduction::Mean) z_loss = z_loss / counted.sum();
  if (options.z_loss_weight != 0) loss = loss + z_loss;
  return {loss, z_loss, lse};
}

// The gradient of class probabilities: w (1 - smoothing) (lse - s) · g.
at::Tensor target_gradient(const at::Tensor& grad_output, const at::Tensor& input, const at::Tensor& target,
                           const at::Tensor& stats, const Options& options) {
  const int64_t dim = class_dim(input);
  const at::Tensor s = transformed(input, options.softcap, options.temperature);
  at::Tensor grad = at::log_softmax(s, dim).neg();
  if (options.weight.has_value()) {
    c10::SymDimVector sizes(input.dim(), 1);
    sizes[dim] = input.sym_size(dim);
    grad = grad * options.weight->to(s.scalar_type()).view_symint(sizes);
  }
  at::Tensor g = options.reduction == "none" ? grad_output.unsqueeze(dim) : grad_output;
  if (options.reduction == "mean") g = g / stats.select(0, 1).to(g.scalar_type());
  return (grad * g * (1 - options.label_smoothing)).to(target.scalar_type());
}

// The gradient from what forward checked, without the dispatcher where nothing watches.
at::Tensor call_backward(const at::Tensor& grad_output, const OptionalTensor& grad_lse, const at::Tensor& input,
                         const at::Tensor& target, const at::Tensor& stats, const Options& options,
                         const at::Tensor& written = {}) {
  if (!all_plain(grad_output, grad_lse, input, target, options))
    return Operator<cross_entropy_backward>::call(grad_output, grad_lse, input, target, stats, options);
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  return cross_entropy_gradient(grad_output, grad_lse, input, target, stats, options, written);
}

struct CrossEntropy {
  using Options = CrossEntropyOptions;
  using Op = Operator<cross_entropy>;
  using Forward = Operator<cross_entropy_forward>;

  static CrossEntropyResult forward_backward(const at::Tensor& input, const at::Tensor& target, const Options& options,
                                             std::optional<double> guess) {
    return cross_entropy_forward_backward(input, target, options, guess, /*in_place=*/false);
  }
  static at::Tensor backward(const at::Tensor& grad_output, const at::Tensor& input, const at::Tensor& target,
                             const at::Tensor& stats, const Options& options, const at::Tensor& written) {
    return call_backward(grad_output, std::nullopt, input, target, stats, options, written);
  }
  static constexpr auto target_backward = target_gradient;
  static constexpr auto composed = tse::composed;
  static bool needs_composition(const at::Tensor& target, const Options& options) {
    return wants_weight_gradient("cross_entropy", target, options.weight);
  }
};
using Loss = RowLoss<CrossEntropy>;

// ---- with metrics ---------------------------------------------------------------------------------------------------

// Loss, z-loss in it, lse; accuracy, predictions.
struct CrossEntropyMetrics {
  using Options = CrossEntropyOptions;
  static constexpr size_t kSaved = 4;  // input, target, stats, lse

  static RowForward forward(const at::Tensor& input, const at::Tensor& target, const Options& options) {
    const auto [loss, stats, z_loss, lse, accuracy, predictions] =
        Operator<cross_entropy_metrics_forward>::call(input, target, options);
    return {{loss, z_loss, lse}, {accuracy, predictions}, {stats, lse}};
  }

  static variable_list backward(const variable_list& grads, const variable_list& saved, const Options& options,
                                std::array<bool, 2> wanted) {
    const at::Tensor &input = saved[0], &target = saved[1], &stats = saved[2], &lse = saved[3];
    const at::Tensor g = grads[0].defined()            ? grads[0]
                         : options.reduction == "none" ? at::zeros_like(lse)
                                                       : at::zeros({}, lse.options());
    OptionalTensor grad_lse;
    if (grads[2].defined()) grad_lse = grads[2];
    if (grads[1].defined() && options.z_loss_weight != 0) {
      at::Tensor of_z = lse * grads[1] * (2 * options.z_loss_weight);
      if (options.reduction == "mean") of_z = of_z / stats[1].to(of_z.scalar_type());
      grad_lse = grad_lse.has_value() ? *grad_lse + of_z : of_z;
    }
    variable_list gradients(2);
    if (wanted[0]) gradients[0] = call_backward(g, grad_lse, input, target, stats, options);
    if (wanted[1]) gradients[1] = target_gradient(g, input, target, stats, options);
    return gradients;
  }

  static constexpr auto composed = tse::composed;
};

// The gradient edge of logits that were overwritten: whoever computes with them afterwards learns it in backward.
struct OverwrittenLogits : torch::autograd::Function<OverwrittenLogits> {
  static at::Tensor forward(AutogradContext*, const at::Tensor& logits) { return logits.detach(); }
  static variable_list backward(AutogradContext*, const variable_list&) {
    TSE_CHECK(false, "cross_entropy", "inplace_backward",
              "expected logits that are not used afterwards, got a gradient for such a use: their memory holds the "
              "gradient of the loss; use them before, or a copy of them");
  }
};

// Of a view it is the base's edge, to which those of all its views lead since the version has changed.
void refuse_later_use(const at::Tensor& input) {
  const at::Tensor owner(input.is_view() && input._base().requires_grad() ? input._base() : input);
  namespace impl = torch::autograd::impl;
  impl::set_gradient_edge(owner, impl::gradient_edge(OverwrittenLogits::apply(owner)));
}

// Forward writes the gradient into the memory of the logits; backward multiplies it by grad_output / guess.
struct CrossEntropyInPlace : torch::autograd::Function<CrossEntropyInPlace> {
  static constexpr bool is_traceable = true;

  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& input, const at::Tensor& target,
                            const Options& options) {
    const std::string_view reduction = options.reduction;
    double guess = reduction != "none" && is_plain_cpu(input) ? Loss::guess_for(reduction).get().value_or(1.0) : 1.0;
    if (!(std::abs(guess) >= 0x1p-40 && std::abs(guess) <= 0x1p40)) guess = 1;  // whatever comes, its ratio is finite
    const bool on_device = reduction != "none" && is_plain_cuda(input);  // the device guesses and compares
    CrossEntropyResult r;
    {
      const at::AutoDispatchBelowADInplaceOrView below_autograd;
      r = cross_entropy_forward_backward(input, target, options, on_device ? std::nullopt : std::optional(guess),
                                         /*in_place=*/true);
    }
    input.unsafeGetTensorImpl()->bump_version();  // whoever saved the logits before finds out
    ctx->save_for_backward({input.detach()});  // shares the version, so that a later change is noticed, too
    if (on_device) ctx->saved_data["stats"] = r.stats;
    else ctx->saved_data["guess"] = guess;
    ctx->saved_data["reduction"] = std::string(reduction);
    return r.loss;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grad_outputs) {
    TSE_CHECK(!at::GradMode::is_enabled(), "cross_entropy", "inplace_backward",
              "expected False for double backward (create_graph=True), since the logits are overwritten, got True");
    const at::Tensor gradient = ctx->get_saved_variables()[0];
    const auto reduction = ctx->saved_data["reduction"].toStringView();
    const at::Tensor g = grad_outputs[0].resolve_neg();
    const auto stats = ctx->saved_data.find("stats");
    const bool on_device = stats != ctx->saved_data.end();
    if (on_device && is_plain_cuda(g)) {
      cross_entropy_rescale(gradient, g, stats->second.toTensor(), reduction);
      gradient.unsafeGetTensorImpl()->bump_version();  // scaled or not: only the device knows
      return {gradient, {}, {}};
    }
    if (reduction != "none" && !on_device && is_plain_cpu(g)) {
      const double value = number_in(g), guess = ctx->saved_data["guess"].toDouble();
      Loss::guess_for(reduction).observe(value);
      if (value != guess) gradient.mul_(value / guess);
      return {gradient, {}, {}};
    }
    at::Tensor factor = on_device             ? g / stats->second.toTensor().select(0, 2)
                        : reduction != "none" ? g / ctx->saved_data["guess"].toDouble()
                        : gradient.dim() == 1 ? g.reshape({})
                                              : g.unsqueeze(1);
    // A batch of gradients has no room in the memory of one.
    return {is_plain(g) ? gradient.mul_(factor) : (gradient * factor).to(gradient.scalar_type()), {}, {}};
  }
};

// The gradient in the memory of the logits, where nothing speaks against it. Tracers and torch.func see cross_entropy:
// a compiler plans memory itself, and a transform has none to write to.
at::Tensor cross_entropy_inplace_autograd(const at::Tensor& input, const at::Tensor& target, const Options& options) {
  // A float16 gradient would underflow, or overflow, before the loss scale of the step arrives; the gradients of target
  // and weight need the logits.
  if (gradient_path(input) != GradientPath::kFused || gradient_path(target) != GradientPath::kNone ||
      wants_weight_gradient("cross_entropy", target, options.weight) || !all_plain(input, target, options) ||
      input.scalar_type() == at::kHalf || needs_promotion(input, target))
    return Loss::autograd(input, target, options);
  const bool is_leaf = input.is_leaf() || (input.is_view() && input._base().is_leaf() && input._base().requires_grad());
  TSE_CHECK(!is_leaf, "cross_entropy", "inplace_backward",
            "expected logits that were computed, got a leaf that requires grad, or a view of one, whose values would "
            "be lost");
  const at::Tensor loss = CrossEntropyInPlace::apply(input, target, options);
  refuse_later_use(input);
  return loss;
}
at::Tensor cross_entropy_inplace(const at::Tensor& input, const at::Tensor& target, const Options& options) {
  return cross_entropy(input, target, options);
}

using FiveTensors = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

FiveTensors with_metrics(const at::Tensor& input, const at::Tensor& target, const Options& options) {
  const auto [loss, stats, z_loss, lse, accuracy, predictions] = cross_entropy_metrics_forward(input, target, options);
  return {loss, z_loss, lse, accuracy, predictions};
}

FiveTensors with_metrics_autograd(const at::Tensor& input, const at::Tensor& target, const Options& options) {
  if (needs_promotion(input, target)) {
    const auto [x, t] = promoted(input, target);
    return with_metrics_autograd(x, t, options);
  }
  const GradientPath path = Loss::path(input, target, options);
  if (path == GradientPath::kFused) {
    const variable_list r = RowResults<CrossEntropyMetrics>::apply(input, target, options);
    return {r[0], r[1], r[2], r[3], r[4]};
  }
  const auto [loss, stats, z_loss, lse, accuracy, predictions] =
      Operator<cross_entropy_metrics_forward>::call(input.detach(), target.detach(), options);
  if (path == GradientPath::kNone) return {loss, z_loss, lse, accuracy, predictions};
  const variable_list c = composed(input, target, options, /*count=*/3, /*stats=*/{});
  return {c[0], c[1], c[2], accuracy, predictions};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(torch_softmax_ext, m) {
  const std::string options = Options::kSchema, required = without_defaults(options);
  const std::string arguments = "(Tensor input, Tensor target, " + options + ") -> ";
  define_public<cross_entropy, Loss::autograd>(m, "cross_entropy", arguments + "Tensor");
  define_public<with_metrics, with_metrics_autograd>(
      m, "cross_entropy_with_metrics",
      arguments + "(Tensor loss, Tensor z_loss, Tensor lse, Tensor accuracy, Tensor predictions)");
  define<cross_entropy_inplace>(m, "_cross_entropy_forward_inplace",
                                "(Tensor(a!) input, Tensor target, " + required + ") -> Tensor");
  implement<cross_entropy_inplace_autograd>(m, "_cross_entropy_forward_inplace", c10::DispatchKey::Autograd);
  const std::string forward = "(Tensor input, Tensor target, " + required + ") -> (Tensor loss, Tensor stats";
  define<cross_entropy_forward>(m, "_cross_entropy_forward", forward + ")");
  define<cross_entropy_metrics_forward>(m, "_cross_entropy_metrics_forward",
                                        forward + ", Tensor z_loss, Tensor lse, Tensor accuracy, Tensor predictions)");
  define<cross_entropy_backward>(
      m, "_cross_entropy_backward",
      "(Tensor grad_output, Tensor? grad_lse, Tensor input, Tensor target, Tensor stats, " + required + ") -> Tensor");
}

}  // namespace tse
