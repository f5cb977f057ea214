// How a call is differentiated. [torch]
#pragma once
#include <ATen/core/Tensor.h>
#include <c10/core/GradMode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include "common/host.h"
#include "common/operator.h"

namespace tse {

enum class GradientPath {
  kNone,      // nobody asks for a gradient
  kFused,     // the first derivative by the fused backward: torch::autograd::Function
  kComposed,  // torch.func transforms and forward-mode AD, which a C++ Function cannot be part of
};

inline GradientPath gradient_path(const at::Tensor& input) {
  const bool needs_grad = c10::GradMode::is_enabled() && input.requires_grad();
  const bool is_dual = input._fw_grad(/*level=*/0).defined();
  if (!needs_grad && !is_dual) return GradientPath::kNone;
  const bool in_functorch =
      c10::impl::tls_local_dispatch_key_set().included_.has(c10::DispatchKey::FuncTorchDynamicLayerFrontMode);
  return is_dual || in_functorch ? GradientPath::kComposed : GradientPath::kFused;
}

inline bool is_plain_cuda(const at::Tensor& t) { return use_cuda(t) && is_plain(t); }

// Its values may be looked at, too.
inline bool is_plain_cpu(const at::Tensor& t) { return t.is_cpu() && !use_cuda(t) && is_plain(t); }

}  // namespace tse
