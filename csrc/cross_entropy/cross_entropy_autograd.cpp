// Autograd and autocast of cross-entropy. [torch]
//
// The fused operators give the first derivative. Where somebody differentiates further or in another mode (double
// backward, torch.func, forward-mode AD), torch's own composition takes their place: the same mathematics, any order.
#include <ATen/SavedTensorHooks.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/cross_entropy_loss.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <atomic>
#include <cmath>
#include <optional>

#include "common/autograd.h"
#include "common/check.h"
#include "common/host.h"
#include "cross_entropy/cross_entropy_host.h"

namespace tse {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

at::Tensor call_cross_entropy(const at::Tensor& input, const at::Tensor& target, int64_t ignore_index,
                              std::string_view reduction) {
  static const auto op = find_op<at::Tensor(const at::Tensor&, const at::Tensor&, int64_t, std::string_view)>(
      "torch_softmax_ext::cross_entropy");
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  return op.call(input, target, ignore_index, reduction);
}

std::tuple<at::Tensor, at::Tensor> call_forward(const at::Tensor& input, const at::Tensor& target, int64_t ignore_index,
                                                std::string_view reduction) {
  static const auto op =
      find_op<std::tuple<at::Tensor, at::Tensor>(const at::Tensor&, const at::Tensor&, int64_t, std::string_view)>(
          "torch_softmax_ext::_cross_entropy_forward");
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  return op.call(input, target, ignore_index, reduction);
}

at::Tensor call_backward(const at::Tensor& grad_output, const at::Tensor& input, const at::Tensor& target,
                         const at::Tensor& stats, int64_t ignore_index, std::string_view reduction) {
  static const auto op = find_op<at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&,
                                            int64_t, std::string_view)>("torch_softmax_ext::_cross_entropy_backward");
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  return op.call(grad_output, input, target, stats, ignore_index, reduction);
}

// The loss as a composition of torch's differentiable operators.
at::Tensor composed(const at::Tensor& input, const at::Tensor& target, int64_t ignore_index,
                    std::string_view reduction) {
  check_cross_entropy(input, target);
  const auto type = input.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const auto code = static_cast<int64_t>(parse_reduction("cross_entropy", reduction));
  // One row may have its target as () or as (1), which torch's own backward does not know.
  const at::Tensor t = input.dim() == 1 ? target.reshape({}) : target;
  const at::Tensor loss = at::cross_entropy_loss(input.to(type), t.to(at::kLong), {}, code, ignore_index);
  return code == at::Reduction::None ? loss.reshape_symint(target.sym_sizes()) : loss;
}

// The incoming gradient of a mean or sum is one number, mostly the same in each step: 1, or 1 / steps of gradient
// accumulation, or a loss scale. Knowing it in the forward pass saves backward's reading of the logits. So it is
// guessed: the last one comes again. Backward compares: a right guess has the bits that backward would compute, a wrong
// one is thrown away, and there is no guessing until the same number came twice (a loss divided by a varying count).
class GradOutputGuess {
 public:
  std::optional<double> get() const {
    return repeated_.load(std::memory_order_relaxed) ? std::optional(last_.load(std::memory_order_relaxed))
                                                     : std::nullopt;
  }
  void observe(double grad_output) {
    repeated_.store(last_.exchange(grad_output, std::memory_order_relaxed) == grad_output, std::memory_order_relaxed);
  }

 private:
  std::atomic<double> last_ = 1;
  std::atomic<bool> repeated_ = true;
};

GradOutputGuess& guess_for(std::string_view reduction) {
  static GradOutputGuess mean, sum;
  return reduction == "mean" ? mean : sum;
}

struct CrossEntropy : torch::autograd::Function<CrossEntropy> {
  static constexpr bool is_traceable = true;

  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& input, const at::Tensor& target,
                            int64_t ignore_index, std::string_view reduction) {
    ctx->saved_data["ignore_index"] = ignore_index;
    ctx->saved_data["reduction"] = std::string(reduction);
    // Not under saved-tensor hooks: checkpointing would keep the gradient that it is there to drop.
    const bool hooks = !at::SavedTensorDefaultHooks::get_tls_state().stack.empty();
    const bool can_guess = reduction != "none" && is_plain_cpu(input) && is_plain_cpu(target) && !hooks;
    if (const auto guess = can_guess ? guess_for(reduction).get() : std::nullopt) {
      const at::AutoDispatchBelowADInplaceOrView below_autograd;
      CrossEntropyResult r = cross_entropy_forward_backward(input, target, ignore_index, reduction, *guess,
                                                            /*in_place=*/false);
      ctx->save_for_backward({input, target, r.stats});
      ctx->saved_data["guess"] = *guess;
      ctx->saved_data["grad_input"] = r.grad_input;
      return r.loss;
    }
    auto [loss, stats] = call_forward(input, target, ignore_index, reduction);
    ctx->save_for_backward({input, target, stats});
    return loss;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grad_outputs) {
    const auto saved = ctx->get_saved_variables();
    const at::Tensor& grad_output = grad_outputs[0];
    const int64_t ignore_index = ctx->saved_data["ignore_index"].toInt();
    const auto reduction = ctx->saved_data["reduction"].toStringView();
    if (at::GradMode::is_enabled()) {  // somebody will differentiate this gradient
      const auto loss = [&](const at::Tensor& x) { return composed(x, saved[1], ignore_index, reduction); };
      return {differentiable_gradient(loss, saved[0], grad_output), {}, {}, {}};
    }
    if (reduction != "none" && is_plain_cpu(saved[0]) && is_plain_cpu(grad_output)) {
      const double g = grad_output.item<double>();
      guess_for(reduction).observe(g);
      if (const auto found = ctx->saved_data.find("grad_input"); found != ctx->saved_data.end()) {
        const at::Tensor grad_input = found->second.toTensor();
        ctx->saved_data.erase(found);  // given away once: whoever gets it may change it
        if (ctx->saved_data["guess"].toDouble() == g) return {grad_input, {}, {}, {}};
      }
    }
    return {call_backward(grad_output, saved[0], saved[1], saved[2], ignore_index, reduction), {}, {}, {}};
  }
};

// The gradient takes the memory of the logits in the forward pass. Their version is bumped: whoever saved them before
// finds out. What the incoming gradient differs from the guess is made up for by a multiplication in backward.
struct CrossEntropyInPlace : torch::autograd::Function<CrossEntropyInPlace> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& input, const at::Tensor& target,
                            int64_t ignore_index, std::string_view reduction) {
    double guess = reduction != "none" && is_plain_cpu(input) ? guess_for(reduction).get().value_or(1.0) : 1.0;
    if (guess == 0 || !std::isfinite(guess)) guess = 1;
    CrossEntropyResult r;
    {
      const at::AutoDispatchBelowADInplaceOrView below_autograd;
      r = cross_entropy_forward_backward(input, target, ignore_index, reduction, guess, /*in_place=*/true);
    }
    input.unsafeGetTensorImpl()->bump_version();
    ctx->save_for_backward({input.detach()});  // shares the version, so that a later change is noticed, too
    ctx->saved_data["guess"] = guess;
    ctx->saved_data["reduction"] = std::string(reduction);
    return r.loss;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grad_outputs) {
    TSE_CHECK(!at::GradMode::is_enabled(), "cross_entropy", "inplace_backward",
              "expected False for double backward (create_graph=True), since the logits are overwritten, got True");
    const at::Tensor gradient = ctx->get_saved_variables()[0];
    const double guess = ctx->saved_data["guess"].toDouble();
    const auto reduction = ctx->saved_data["reduction"].toStringView();
    at::Tensor g = grad_outputs[0];
    if (reduction == "none") {
      gradient.mul_(gradient.dim() == 1 ? g.reshape({}) : g.unsqueeze(1));
    } else if (is_plain_cpu(g)) {
      const double value = g.item<double>();
      guess_for(reduction).observe(value);
      if (value != guess) gradient.mul_(value / guess);
    } else {
      gradient.mul_(g / guess);
    }
    return {gradient, {}, {}, {}};
  }
};

at::Tensor cross_entropy_autograd(const at::Tensor& input, const at::Tensor& target, int64_t ignore_index,
                                  std::string_view reduction) {
  switch (gradient_path(input)) {
    case GradientPath::kFused:
      return CrossEntropy::apply(input, target, ignore_index, reduction);
    case GradientPath::kComposed:
      return composed(input, target, ignore_index, reduction);
    default:
      return call_cross_entropy(input, target, ignore_index, reduction);
  }
}

// Where a tracer watches, writing in place is left to its compiler, and torch.func has no memory to write to.
at::Tensor cross_entropy_inplace_autograd(const at::Tensor& input, const at::Tensor& target, int64_t ignore_index,
                                          std::string_view reduction) {
  // A float16 gradient would underflow, or overflow, before the loss scale of the step arrives.
  if (gradient_path(input) != GradientPath::kFused || !is_plain(input) || input.scalar_type() == at::kHalf)
    return cross_entropy_autograd(input, target, ignore_index, reduction);
  const bool is_leaf = input.is_leaf() || (input.is_view() && input._base().is_leaf() && input._base().requires_grad());
  TSE_CHECK(!is_leaf, "cross_entropy", "inplace_backward",
            "expected logits that were computed, got a leaf that requires grad, or a view of one, whose values would "
            "be lost");
  return CrossEntropyInPlace::apply(input, target, ignore_index, reduction);
}

}  // namespace

TORCH_LIBRARY_IMPL(torch_softmax_ext, Autograd, m) {
  m.impl("cross_entropy", cross_entropy_autograd);
  m.impl("_cross_entropy_inplace_backward", cross_entropy_inplace_autograd);
}

// Under autocast the logits stay as they are: the kernels compute in fp32 and return an fp32 loss, so no upcast copy.
TORCH_LIBRARY_IMPL(torch_softmax_ext, AutocastCPU, m) {
  m.impl("cross_entropy", torch::CppFunction::makeFallthrough());
}
TORCH_LIBRARY_IMPL(torch_softmax_ext, AutocastCUDA, m) {
  m.impl("cross_entropy", torch::CppFunction::makeFallthrough());
}

}  // namespace tse
