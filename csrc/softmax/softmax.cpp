// Softmax: the operator. [torch]
#include "softmax/softmax.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/softmax.h>

#include <limits>

#include "common/row_map.h"

namespace tse {
namespace {

struct Softmax {
  static constexpr const char* kName = "softmax";
  static constexpr RowMapKernels kForward = {softmax_fwd_rows, nullptr};
  static constexpr RowMapKernels kBackward = {softmax_bwd_rows, nullptr};

  static at::Tensor composed(const at::Tensor& input, int64_t dim) {
    const at::Tensor x = input.to(accumulate_type(input.scalar_type()));
    const at::Tensor masked = (x == -std::numeric_limits<double>::infinity()).all(dim, /*keepdim=*/true);
    return at::softmax(x.masked_fill(masked, 0), dim).masked_fill(masked, 0).to(input.scalar_type());
  }

  static at::Tensor composed_backward(const at::Tensor& grad_output, const at::Tensor& output, int64_t dim) {
    const auto type = accumulate_type(output.scalar_type());
    const at::Tensor p = output.to(type), g = grad_output.to(type);
    return (p * (g - (p * g).sum(dim, /*keepdim=*/true))).to(output.scalar_type());
  }
};

}  // namespace

TORCH_LIBRARY_FRAGMENT(torch_softmax_ext, m) { define_row_map<Softmax>(m); }

}  // namespace tse
