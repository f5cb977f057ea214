// Host entries of the sparse maps: schema, checks, allocation, dispatch to CPU rows or CUDA launchers. [torch]
#include "sparsemax/sparsemax.h"

#include <ATen/WrapDimUtils.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include "common/host.h"

namespace tse {
namespace {

constexpr const char* kOp = "sparsemax";

int64_t check(const at::Tensor& input, int64_t dim) {
  check_floating(kOp, "input", input);
  const int64_t rank = input.dim();
  const int64_t low = rank == 0 ? -1 : -rank, high = rank == 0 ? 0 : rank - 1;
  TSE_CHECK_INDEX(dim >= low && dim <= high, kOp, "dim", "expected a dimension in [", low, ", ", high,
                  "] for input of shape ", input.sym_sizes(), ", got ", dim);
  return at::maybe_wrap_dim(dim, rank);
}

int64_t check_backward(const at::Tensor& grad_output, const at::Tensor& output, int64_t dim) {
  dim = check(output, dim);
  check_handed(kOp, "grad_output", grad_output, output, output.scalar_type(), output.sym_sizes());
  return dim;
}

at::Tensor sparsemax(const at::Tensor& input, int64_t dim) {
  dim = check(input, dim);
  const c10::OptionalDeviceGuard guard(input.device());
  const at::Tensor output = with_huge_pages(at::empty_like(input));
  if (input.numel() == 0) return output;
  const RowTensor x = as_rows(input, dim), y = as_rows(output, dim);
  RowMapParams p{};
  p.dtype = dtype_of(input);
  p.rows = x.rows;
  p.input = x.tensor.const_data_ptr();
  p.output_rows = y.rows;
  p.output = y.tensor.mutable_data_ptr();
  if (use_cuda(input)) {
    if constexpr (kHasCuda) launch_sparsemax_fwd(p, current_stream(input));
  } else {
    parallel_rows(p.rows, [&](int64_t begin, int64_t end) { sparsemax_fwd_rows(p, begin, end); });
  }
  if (!y.tensor.is_same(output)) output.copy_(y.tensor);
  return output;
}

at::Tensor sparsemax_backward(const at::Tensor& grad_output, const at::Tensor& output, int64_t dim) {
  dim = check_backward(grad_output, output, dim);
  const c10::OptionalDeviceGuard guard(output.device());
  const at::Tensor grad_input = with_huge_pages(at::empty_like(output));
  if (output.numel() == 0) return grad_input;
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
  if (use_cuda(output)) {
    if constexpr (kHasCuda) launch_sparsemax_bwd(p, current_stream(output));
  } else {
    parallel_rows(p.output_rows, [&](int64_t begin, int64_t end) { sparsemax_bwd_rows(p, begin, end); });
  }
  if (!out.tensor.is_same(grad_input)) grad_input.copy_(out.tensor);
  return grad_input;
}

at::Tensor sparsemax_meta(const at::Tensor& input, int64_t dim) {
  check(input, dim);
  return at::empty_like(input);
}

at::Tensor sparsemax_backward_meta(const at::Tensor& grad_output, const at::Tensor& output, int64_t dim) {
  check_backward(grad_output, output, dim);
  return at::empty_like(output);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(torch_softmax_ext, m) {
  const std::vector<at::Tag> tags = {at::Tag::pt2_compliant_tag};
  m.def("sparsemax(Tensor input, int dim=-1) -> Tensor", tags);
  m.def("_sparsemax_backward(Tensor grad_output, Tensor output, int dim) -> Tensor", tags);
}

#define TSE_REGISTER(key, suffix)                              \
  TORCH_LIBRARY_IMPL(torch_softmax_ext, key, m) {              \
    m.impl("sparsemax", sparsemax##suffix);                    \
    m.impl("_sparsemax_backward", sparsemax_backward##suffix); \
  }
TSE_REGISTER(CPU, )
TSE_REGISTER(CUDA, )
TSE_REGISTER(Meta, _meta)

}  // namespace tse
