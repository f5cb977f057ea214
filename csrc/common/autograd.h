// What the autograd files of the operators share. [torch]
#pragma once
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/GradMode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/autograd/autograd.h>

#include "common/host.h"

namespace tse {

template <class Signature>
c10::TypedOperatorHandle<Signature> find_op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

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

// A tensor with memory behind it that no tracer, mode or subclass watches: host entries may be called without the
// dispatcher.
inline bool is_plain(const at::Tensor& t) {
  // Excluded keys count, too: inside a transform its own is.
  const auto keys = t.key_set() | c10::impl::tls_local_dispatch_key_set().included_;
  constexpr c10::DispatchKeySet kWatchers(
      {c10::DispatchKey::Python, c10::DispatchKey::PythonTLSSnapshot, c10::DispatchKey::PythonDispatcher,
       c10::DispatchKey::Functionalize, c10::DispatchKey::PreDispatch, c10::DispatchKey::FuncTorchDynamicLayerFrontMode,
       c10::DispatchKey::FuncTorchGradWrapper, c10::DispatchKey::FuncTorchBatched, c10::DispatchKey::Batched,
       c10::DispatchKey::Negative, c10::DispatchKey::ZeroTensor});
  return (t.is_cpu() || t.is_cuda()) && !keys.has_any(kWatchers);
}

inline bool is_plain_cuda(const at::Tensor& t) { return use_cuda(t) && is_plain(t); }

// Its values may be looked at, too.
inline bool is_plain_cpu(const at::Tensor& t) { return t.is_cpu() && !use_cuda(t) && is_plain(t); }

// The gradient of `function` at `input`, itself differentiable in `input` and `grad_output`.
template <class F>
at::Tensor differentiable_gradient(const F& function, const at::Tensor& input, const at::Tensor& grad_output) {
  return torch::autograd::grad({function(input)}, {input}, {grad_output}, /*retain_graph=*/true,
                               /*create_graph=*/true)[0];
}

}  // namespace tse
