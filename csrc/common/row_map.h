// The form of the row maps, which make of each row of `input` along `dim` a row of the same length: what they share.
// [torch]
//
// A map is a struct with its name, its kernels and two compositions of torch's operators; define_row_map<Map>(m)
// defines <name>(Tensor input, int dim=-1) and _<name>_backward(Tensor grad_output, Tensor output, int dim). The
// gradient is computed from the output, which is all that is kept for it.
//
//   struct Map {
//     static constexpr const char* kName;
//     static constexpr RowMapKernels kForward, kBackward;
//     // The map, differentiable any number of times; for torch.func and forward-mode AD.
//     static at::Tensor composed(const at::Tensor& input, int64_t dim);
//     // The gradient, differentiable any number of times in what is handed to it; for double backward.
//     static at::Tensor composed_backward(const at::Tensor& grad_output, const at::Tensor& output, int64_t dim);
//   };
#pragma once
#include <ATen/WrapDimUtils.h>
#include <ATen/ops/empty_like.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <string>

#include "common/autograd.h"
#include "common/host.h"
#include "common/operator.h"
#include "common/python.h"
#include "common/row_params.h"

namespace tse {

using RowMapKernels = Kernels<RowMapParams>;

template <class Map>
struct RowMap {
  static int64_t check(const at::Tensor& input, int64_t dim) {
    check_floating(Map::kName, "input", input);
    const int64_t rank = input.dim();
    const int64_t low = rank == 0 ? -1 : -rank, high = rank == 0 ? 0 : rank - 1;
    TSE_CHECK_INDEX(dim >= low && dim <= high, Map::kName, "dim", "expected a dimension in [", low, ", ", high,
                    "] for input of shape ", input.sym_sizes(), ", got ", dim);
    return at::maybe_wrap_dim(dim, rank);
  }

  // A map without a CUDA kernel takes torch's operators there.
  static bool is_composed(const at::Tensor& t, const RowMapKernels& kernels) {
    return kernels.cuda == nullptr && use_cuda(t);
  }

  static at::Tensor forward(const at::Tensor& input, int64_t dim) {
    dim = check(input, dim);
    const c10::OptionalDeviceGuard guard(input.device());
    if (is_composed(input, Map::kForward)) return Map::composed(input, dim);
    const at::Tensor output = with_huge_pages(at::empty_like(input));
    if (input.is_meta() || input.numel() == 0) return output;
    const RowTensor x = as_rows(input, dim), y = as_rows(output, dim);
    RowMapParams p{};
    p.dtype = dtype_of(input);
    p.rows = x.rows;
    p.input = x.tensor.const_data_ptr();
    p.output_rows = y.rows;
    p.output = y.tensor.mutable_data_ptr();
    Map::kForward.run(Map::kName, p, p.rows, x.rows.stride_n == 1 && y.rows.stride_n == 1, input);
    if (!y.tensor.is_same(output)) output.copy_(y.tensor);
    return output;
  }

  static at::Tensor backward(const at::Tensor& grad_output, const at::Tensor& output, int64_t dim) {
    dim = check(output, dim);
    check_handed(Map::kName, "grad_output", grad_output, output, output.scalar_type(), output.sym_sizes());
    const c10::OptionalDeviceGuard guard(output.device());
    if (is_composed(output, Map::kBackward)) return Map::composed_backward(grad_output, output, dim);
    const at::Tensor grad_input = with_huge_pages(at::empty_like(output));
    if (output.is_meta() || output.numel() == 0) return grad_input;
    const RowTensor y = as_rows(output, dim), out = as_rows(grad_input, dim);
    RowTensor g = as_rows(grad_output, dim);
    // CUDA kernels read g by 16 bytes where they read the output so; an expanded g costs a copy.
    if (use_cuda(output) && y.rows.stride_n == 1 && g.rows.stride_n != 1)
      g = as_rows(at::empty_like(output).copy_(grad_output), dim);
    RowMapParams p{};
    p.dtype = dtype_of(output);
    p.output_rows = y.rows;
    p.output = const_cast<void*>(y.tensor.const_data_ptr());
    p.grad_output_rows = g.rows;
    p.grad_output = g.tensor.const_data_ptr();
    p.grad_input_rows = out.rows;
    p.grad_input = out.tensor.mutable_data_ptr();
    const bool contiguous = y.rows.stride_n == 1 && g.rows.stride_n == 1 && out.rows.stride_n == 1;
    Map::kBackward.run(Map::kName, p, p.output_rows, contiguous, output);
    if (!out.tensor.is_same(grad_input)) grad_input.copy_(out.tensor);
    return grad_input;
  }

  struct Function : torch::autograd::Function<Function> {
    static constexpr bool is_traceable = true;

    static at::Tensor forward(torch::autograd::AutogradContext* ctx, const at::Tensor& input, int64_t dim) {
      const at::Tensor output = Operator<RowMap::forward>::call(input, dim);
      ctx->save_for_backward({output});
      ctx->saved_data["dim"] = dim;
      return output;
    }
    static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                   torch::autograd::variable_list grad_outputs) {
      const at::Tensor output = ctx->get_saved_variables()[0], &grad_output = grad_outputs[0];
      const int64_t dim = ctx->saved_data["dim"].toInt();
      if (at::GradMode::is_enabled())  // double backward
        return {Map::composed_backward(grad_output, output, dim), {}};
      return {Operator<RowMap::backward>::call(grad_output, output, dim), {}};
    }
  };

  static at::Tensor autograd(const at::Tensor& input, int64_t dim) {
    switch (gradient_path(input)) {
      case GradientPath::kFused:
        return Function::apply(input, dim);
      case GradientPath::kComposed:
        return Map::composed(input, dim);
      default:
        return Operator<forward>::call(input, dim);
    }
  }
};

template <class Map>
void define_row_map(torch::Library& m) {
  using Form = RowMap<Map>;
  static const std::string backward = std::string("_") + Map::kName + "_backward";
  define_public<Form::forward, Form::autograd>(m, Map::kName, "(Tensor input, int dim=-1) -> Tensor");
  define<Form::backward>(m, backward.c_str(), "(Tensor grad_output, Tensor output, int dim) -> Tensor");
}

}  // namespace tse
