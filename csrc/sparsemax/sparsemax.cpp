// Sparsemax: the operator. [torch]
#include "sparsemax/sparsemax.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/where.h>

#include "common/row_map.h"

namespace tse {
namespace {

// Sparsemax is linear in the logits of its support: the support (no derivative of its own) comes from the operator, the
// rest is torch's. Exact in value and in every derivative.
struct Support {
  at::Tensor mask, size;
  Support(const at::Tensor& output, int64_t dim)
      : mask((output <= 0).logical_not()),  // NaN belongs to it, so that it spreads
        size(mask.sum(dim, /*keepdim=*/true).clamp_min(1)) {}

  at::Tensor sum(const at::Tensor& t, int64_t dim) const { return at::where(mask, t, 0).sum(dim, /*keepdim=*/true); }
};

struct Sparsemax {
  using Options = RowMapOptions;
  static constexpr const char* kName = "sparsemax";
  static constexpr double kMasked = 0;
  static constexpr bool kWidensHalf = false;
  static constexpr ForwardKernels kForward = {sparsemax_fwd_rows, launch_sparsemax_fwd, launch_prepared_sparsemax_fwd};
  static constexpr RowMapKernels kBackward = {sparsemax_bwd_rows, launch_sparsemax_bwd};

  static at::Tensor composed(const at::Tensor& logits, const Options& o) {
    const Support support(Operator<RowMap<Sparsemax>::forward>::call(logits, o), o.dim);
    const at::Tensor tau = (support.sum(logits, o.dim) - 1) / support.size;
    return at::where(support.mask, logits - tau, 0);
  }

  static at::Tensor composed_backward(const at::Tensor& grad_output, const at::Tensor& output, const Options& o) {
    const Support support(output.detach(), o.dim);
    return at::where(support.mask, grad_output - support.sum(grad_output, o.dim) / support.size, 0);
  }
};

}  // namespace

TORCH_LIBRARY_FRAGMENT(torch_softmax_ext, m) { define_row_map<Sparsemax>(m); }

}  // namespace tse
