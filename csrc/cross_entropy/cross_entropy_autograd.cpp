// Autograd and autocast of cross-entropy. [torch]
//
// The fused operators give the first derivative. Where somebody differentiates further or in another mode (double
// backward, torch.func, forward-mode AD), torch's own composition takes their place: the same mathematics, any order.
#include <ATen/ops/cross_entropy_loss.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "common/autograd.h"
#include "common/check.h"

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
  const auto type = input.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const auto code = static_cast<int64_t>(parse_reduction("cross_entropy", reduction));
  // One row may have its target as () or as (1), which torch's own backward does not know.
  const at::Tensor t = input.dim() == 1 ? target.reshape({}) : target;
  const at::Tensor loss = at::cross_entropy_loss(input.to(type), t.to(at::kLong), {}, code, ignore_index);
  return code == at::Reduction::None ? loss.reshape_symint(target.sym_sizes()) : loss;
}

struct CrossEntropy : torch::autograd::Function<CrossEntropy> {
  static constexpr bool is_traceable = true;

  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& input, const at::Tensor& target,
                            int64_t ignore_index, std::string_view reduction) {
    auto [loss, stats] = call_forward(input, target, ignore_index, reduction);
    ctx->save_for_backward({input, target, stats});
    ctx->saved_data["ignore_index"] = ignore_index;
    ctx->saved_data["reduction"] = std::string(reduction);
    return loss;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grad_outputs) {
    const auto saved = ctx->get_saved_variables();
    const int64_t ignore_index = ctx->saved_data["ignore_index"].toInt();
    const auto reduction = ctx->saved_data["reduction"].toStringView();
    if (at::GradMode::is_enabled()) {  // somebody will differentiate this gradient
      const auto loss = [&](const at::Tensor& x) { return composed(x, saved[1], ignore_index, reduction); };
      return {differentiable_gradient(loss, saved[0], grad_outputs[0]), {}, {}, {}};
    }
    return {call_backward(grad_outputs[0], saved[0], saved[1], saved[2], ignore_index, reduction), {}, {}, {}};
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

}  // namespace

TORCH_LIBRARY_IMPL(torch_softmax_ext, Autograd, m) { m.impl("cross_entropy", cross_entropy_autograd); }

// Under autocast the logits stay as they are: the kernels compute in fp32 and return an fp32 loss, so no upcast copy.
TORCH_LIBRARY_IMPL(torch_softmax_ext, AutocastCPU, m) {
  m.impl("cross_entropy", torch::CppFunction::makeFallthrough());
}
TORCH_LIBRARY_IMPL(torch_softmax_ext, AutocastCUDA, m) {
  m.impl("cross_entropy", torch::CppFunction::makeFallthrough());
}

}  // namespace tse
