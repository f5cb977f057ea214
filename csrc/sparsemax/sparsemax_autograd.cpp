// Autograd and autocast of the sparse maps. [torch]
#include <ATen/TensorOperators.h>
#include <ATen/ops/where.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "common/autograd.h"

namespace tse {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

at::Tensor call_sparsemax(const at::Tensor& input, int64_t dim) {
  static const auto op = find_op<at::Tensor(const at::Tensor&, int64_t)>("torch_softmax_ext::sparsemax");
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  return op.call(input, dim);
}

at::Tensor call_sparsemax_backward(const at::Tensor& grad_output, const at::Tensor& output, int64_t dim) {
  static const auto op =
      find_op<at::Tensor(const at::Tensor&, const at::Tensor&, int64_t)>("torch_softmax_ext::_sparsemax_backward");
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  return op.call(grad_output, output, dim);
}

// Sparsemax is linear in the logits of its support: the support (no derivative of its own) comes from the operator, the
// rest is torch's. Exact in value and in every derivative.
struct Support {
  at::Tensor mask, size;
  Support(const at::Tensor& output, int64_t dim)
      : mask((output <= 0).logical_not()),  // NaN belongs to it, so that it spreads
        size(mask.sum(dim, /*keepdim=*/true).clamp_min(1)) {}

  at::Tensor sum(const at::Tensor& t, int64_t dim) const { return at::where(mask, t, 0).sum(dim, /*keepdim=*/true); }
};

at::Tensor composed(const at::Tensor& input, int64_t dim) {
  const Support support(call_sparsemax(input, dim), dim);
  const at::Tensor x = input.to(input.scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
  const at::Tensor tau = (support.sum(x, dim) - 1) / support.size;
  return at::where(support.mask, x - tau, 0).to(input.scalar_type());
}

struct Sparsemax : torch::autograd::Function<Sparsemax> {
  static constexpr bool is_traceable = true;

  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& input, int64_t dim) {
    const at::Tensor output = call_sparsemax(input, dim);
    ctx->save_for_backward({output});
    ctx->saved_data["dim"] = dim;
    return output;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grad_outputs) {
    const at::Tensor output = ctx->get_saved_variables()[0], &g = grad_outputs[0];
    const int64_t dim = ctx->saved_data["dim"].toInt();
    if (at::GradMode::is_enabled()) {  // somebody will differentiate this gradient
      const Support support(output.detach(), dim);
      return {at::where(support.mask, g - support.sum(g, dim) / support.size, 0), {}};
    }
    return {call_sparsemax_backward(g, output, dim), {}};
  }
};

at::Tensor sparsemax_autograd(const at::Tensor& input, int64_t dim) {
  switch (gradient_path(input)) {
    case GradientPath::kFused:
      return Sparsemax::apply(input, dim);
    case GradientPath::kComposed:
      return composed(input, dim);
    default:
      return call_sparsemax(input, dim);
  }
}

}  // namespace

TORCH_LIBRARY_IMPL(torch_softmax_ext, Autograd, m) { m.impl("sparsemax", sparsemax_autograd); }

// Under autocast the logits stay as they are: half types are computed in fp32 anyway.
TORCH_LIBRARY_IMPL(torch_softmax_ext, AutocastCPU, m) { m.impl("sparsemax", torch::CppFunction::makeFallthrough()); }
TORCH_LIBRARY_IMPL(torch_softmax_ext, AutocastCUDA, m) { m.impl("sparsemax", torch::CppFunction::makeFallthrough()); }

}  // namespace tse
