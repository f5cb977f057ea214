// Entmax15, and entmax with any alpha: the operators. [torch]
#include "entmax/entmax.h"

#include <ATen/TensorOperators.h>
#include <ATen/WrapDimUtils.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/expm1.h>
#include <ATen/ops/full.h>
#include <ATen/ops/log.h>
#include <ATen/ops/log1p.h>
#include <ATen/ops/where.h>

#include "common/row_map.h"
#include "entmax/entmax_host.h"

namespace tse {
namespace {

// With c = alpha - 1 and d = max x - x, p = (1 - c w)^(1/c) of w = s + d, where s is such that Σ p = 1; for c = 0 that
// is exp(-w).

at::Tensor c_of(const at::Tensor& like, const EntmaxOptions& o) {
  const at::Tensor alpha = o.row_alpha.has_value() ? o.row_alpha->to(like.device(), like.scalar_type())
                                                   : at::full({}, o.alpha, like.options());
  return alpha - 1;
}

// log(1 - c w) / c, by its series next to c = 0.
at::Tensor log_p(const at::Tensor& w, const at::Tensor& c) {
  const at::Tensor is_small = c.abs() < 1e-4, safe = at::where(is_small, 1, c), cw = c * w;
  const at::Tensor series = -w * (1 + cw * (0.5 + cw * (1.0 / 3 + cw * 0.25)));
  // At the edge of the support a rounding of s may step over it.
  const double edge = -1 + (w.scalar_type() == at::kDouble ? 0x1p-53 : 0x1p-24);
  return at::where(is_small, series, at::log1p((-safe * at::where(is_small, 0, w)).clamp_min(edge)) / safe);
}

// The probabilities, whose derivatives nobody asks for.
at::Tensor probabilities(const at::Tensor& logits, const EntmaxOptions& o);

// Both operators; Options of entmax15 have no alpha but 1.5.
template <class Map>
struct Compositions {
  // Support and threshold have no derivative of their own. Three of Newton's steps from there give value and
  // derivatives, the first seven of them.
  template <class Options>
  static at::Tensor composed(const at::Tensor& logits, const Options& o) {
    const at::Tensor p = probabilities(logits, EntmaxOptions{o});
    const at::Tensor outside = p <= 0, c = c_of(logits, EntmaxOptions{o});
    const at::Tensor max = logits.detach().amax(o.dim, /*keepdim=*/true);
    const at::Tensor d = (max - logits).masked_fill(outside, 0);
    const at::Tensor largest = at::log(p.amax(o.dim, /*keepdim=*/true)), c0 = c.detach();
    const at::Tensor is_zero = c0 == 0;
    at::Tensor s = at::where(is_zero, -largest, -at::expm1(c0 * largest) / at::where(is_zero, 1, c0));
    at::Tensor result;
    for (int step = 0; step < 4; ++step) {
      const at::Tensor log_of = log_p((s + d).masked_fill(outside, 0), c);
      result = log_of.exp().masked_fill(outside, 0);
      const at::Tensor slope = ((1 - c) * log_of).exp().masked_fill(outside, 0);  // p^(2 - alpha)
      s = s + (result.sum(o.dim, /*keepdim=*/true) - 1) / slope.sum(o.dim, /*keepdim=*/true);
    }
    return at::where(c > 1, result / result.sum(o.dim, /*keepdim=*/true), result);  // above 2 a rounding of s is seen
  }

  template <class Options>
  static at::Tensor composed_backward(const at::Tensor& grad_output, const at::Tensor& output, const Options& o) {
    return projected(grad_output, weights(output, c_of(output, EntmaxOptions{o})), o.dim);
  }

  static at::Tensor weights(const at::Tensor& p, const at::Tensor& c) {
    const at::Tensor outside = p <= 0;
    return p.masked_fill(outside, 1).pow(1 - c).masked_fill(outside, 0);
  }
};

struct Entmax15 : Compositions<Entmax15> {
  using Options = RowMapOptions;
  static constexpr const char* kName = "entmax15";
  static constexpr double kMasked = 0;
  static constexpr bool kWidensHalf = false;
  static constexpr ForwardKernels kForward = {entmax15_fwd_rows, launch_entmax15_fwd, launch_prepared_entmax15_fwd};
  static constexpr RowMapKernels kBackward = {entmax15_bwd_rows, launch_entmax15_bwd};
};

struct Entmax : Compositions<Entmax> {
  using Options = EntmaxOptions;
  static constexpr const char* kName = "entmax";
  static constexpr double kMasked = 0;
  static constexpr bool kWidensHalf = true;
  static constexpr ForwardKernels kForward = {fwd_rows_of_alpha, nullptr, launch_prepared_entmax_fwd};
  static constexpr RowMapKernels kBackward = {bwd_rows_of_alpha, launch_entmax_bwd};

  // Of row_alpha.
  static at::Tensor alpha_gradient(const at::Tensor& grad_output, const at::Tensor& output, const Options& o) {
    const bool is_fused = !at::GradMode::is_enabled() && is_plain_cpu(grad_output) && is_plain_cpu(output) &&
                          output.numel() > 0 && is_plain(*o.row_alpha);
    const at::Tensor of_rows =
        is_fused ? fused_alpha_gradient(grad_output, output, o) : composed_alpha_gradient(grad_output, output, o);
    return at::sum_to(of_rows, o.row_alpha->sym_sizes()).to(o.row_alpha->options());
  }

  static at::Tensor fused_alpha_gradient(const at::Tensor& grad_output, const at::Tensor& output, const Options& o) {
    if (o.is_mixed())
      return by_steepness(o, [&](const Options& same) { return fused_alpha_gradient(grad_output, output, same); });
    const auto type = o.is_double() ? at::kDouble : accumulate_type(output.scalar_type());
    const int64_t dim = at::maybe_wrap_dim(o.dim, output.dim());
    const auto contiguous_rows = [&](const at::Tensor& t) {
      return t.dim() == 0 ? t.to(type) : t.movedim(dim, -1).to(type).contiguous();
    };
    const at::Tensor p = contiguous_rows(output), g = contiguous_rows(grad_output);
    auto sizes = output.sizes().vec();
    if (!sizes.empty()) sizes[dim] = 1;
    const at::Tensor of_rows = at::empty(sizes, p.options().dtype(at::kDouble));
    const NumbersOfRows alpha(o.alpha, o.row_alpha, output, dim);
    RowMapParams params{};
    params.dtype = dtype_of(p);
    params.output_rows = params.grad_output_rows = *try_rows(p, p.dim() - 1);
    params.output = const_cast<void*>(p.const_data_ptr());
    params.grad_output = g.const_data_ptr();
    params.grad_input = of_rows.mutable_data_ptr();
    params.alpha = alpha.numbers;
    parallel_rows(params, params.output_rows, /*contiguous=*/true, alpha_bwd_rows);
    return of_rows;
  }

  // With L = log p, r = p L² φ(-c L), φ(t) = (e^t - 1 - t) / t², and s = p^(2 - alpha): dp/d alpha = s Σ r / Σ s - r.
  static at::Tensor composed_alpha_gradient(const at::Tensor& grad_output, const at::Tensor& output, const Options& o) {
    const auto type = accumulate_type(output.scalar_type());
    const at::Tensor p = output.to(type), c = c_of(p, o), outside = p <= 0;
    const at::Tensor g = grad_output.to(type).masked_fill(outside, 0);  // which may be infinite there
    const at::Tensor log_p = at::log(p.masked_fill(outside, 1)), t = -c * log_p;
    const at::Tensor is_small = t.abs() < 0.5, small = at::where(is_small, t, 0), large = at::where(is_small, 1, t);
    at::Tensor phi = at::full({}, 0.0, p.options());
    double factorial = 1;
    for (int k = 2; k <= 14; ++k) factorial *= k;
    for (int k = 14; k >= 2; factorial /= k--) phi = phi * small + 1 / factorial;
    phi = at::where(is_small, phi, (at::expm1(large) - large) / (large * large));
    const at::Tensor r = p * log_p * log_p * phi, s = weights(p, c), sum = s.sum(o.dim, /*keepdim=*/true);
    const at::Tensor mean = (s * g).sum(o.dim, /*keepdim=*/true) / sum.masked_fill(sum == 0, 1);
    return -(r * (g - mean)).masked_fill(outside, 0).sum(o.dim, /*keepdim=*/true);
  }
};

at::Tensor probabilities(const at::Tensor& logits, const EntmaxOptions& o) {
  if (!o.row_alpha.has_value() && o.alpha == 1.5)
    return Operator<RowMap<Entmax15>::forward>::call(logits, RowMapOptions(o));
  return Operator<RowMap<Entmax>::forward>::call(logits, o);
}

}  // namespace

at::Tensor entmax_map(const at::Tensor& input, int64_t dim, double alpha, const OptionalTensor& row_alpha) {
  EntmaxOptions o{};
  o.dim = dim;
  o.alpha = alpha;
  o.row_alpha = row_alpha;
  if (!row_alpha.has_value() && alpha == 1.5)
    return Operator<RowMap<Entmax15>::forward>::dispatch(input, RowMapOptions(o));
  return Operator<RowMap<Entmax>::forward>::dispatch(input, o);
}

TORCH_LIBRARY_FRAGMENT(torch_softmax_ext, m) {
  define_row_map<Entmax15>(m);
  define_row_map<Entmax>(m);
}

}  // namespace tse
