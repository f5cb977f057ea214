// Softmax and log-softmax: the operators. [torch]
#include "softmax/softmax.h"

#include <ATen/ops/log_softmax.h>
#include <ATen/ops/softmax.h>
#include <ATen/ops/where.h>

#include "common/row_map.h"

namespace tse {
namespace {

struct Softmax {
  using Options = RowMapOptions;
  static constexpr const char* kName = "softmax";
  static constexpr double kMasked = 0;
  static constexpr bool kWidensHalf = false;
  static constexpr ForwardKernels kForward = {softmax_fwd_rows, launch_softmax_fwd, launch_prepared_softmax_fwd};
  static constexpr RowMapKernels kBackward = {softmax_bwd_rows, launch_softmax_bwd};

  static at::Tensor composed(const at::Tensor& logits, const Options& o) { return at::softmax(logits, o.dim); }

  static at::Tensor composed_backward(const at::Tensor& grad_output, const at::Tensor& output, const Options& o) {
    return projected(grad_output, output, o.dim);
  }
};

struct LogSoftmax {
  using Options = RowMapOptions;
  static constexpr const char* kName = "log_softmax";
  static constexpr double kMasked = -std::numeric_limits<double>::infinity();
  static constexpr bool kWidensHalf = false;
  static constexpr ForwardKernels kForward = {log_softmax_fwd_rows, launch_log_softmax_fwd,
                                              launch_prepared_log_softmax_fwd};
  static constexpr RowMapKernels kBackward = {log_softmax_bwd_rows, launch_log_softmax_bwd};

  static at::Tensor composed(const at::Tensor& logits, const Options& o) { return at::log_softmax(logits, o.dim); }

  static at::Tensor composed_backward(const at::Tensor& grad_output, const at::Tensor& output, const Options& o) {
    // As the kernels: next to a probability of 1, without a difference of rounded numbers.
    const at::Tensor g = grad_output.masked_fill(output == kMasked, 0), p = output.exp();
    const at::Tensor is_one = output > kNextToOne;
    const auto sum_of_others = [&](const at::Tensor& t) {
      return t.masked_fill(is_one, 0).sum(o.dim, /*keepdim=*/true);
    };
    return at::where(is_one, g * sum_of_others(p) - p * sum_of_others(g), g - p * g.sum(o.dim, /*keepdim=*/true));
  }
};

}  // namespace

TORCH_LIBRARY_FRAGMENT(torch_softmax_ext, m) {
  define_row_map<Softmax>(m);
  define_row_map<LogSoftmax>(m);
}

}  // namespace tse
