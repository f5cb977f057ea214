// The losses of sparsemax, entmax15 and entmax: the operators. [torch]
#include "entmax_loss/entmax_loss.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/expm1.h>
#include <ATen/ops/full.h>
#include <ATen/ops/log.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include <cstring>
#include <limits>
#include <optional>
#include <string>
#include <tuple>

#include "common/python.h"
#include "common/row_loss.h"
#include "common/row_map_options.h"
#include "common/targets.h"
#include "entmax/entmax.h"
#include "entmax/entmax_host.h"

namespace tse {
namespace {

using torch::autograd::variable_list;
using TwoTensors = std::tuple<at::Tensor, at::Tensor>;

// The arguments of the schemas after the tensors. alpha: of sparsemax_loss and entmax15_loss their own.
struct LossOptions {
  int64_t ignore_index;
  std::string_view reduction;
  double alpha;
  OptionalTensor row_alpha;

  c10::IValue saved() const {
    return std::make_tuple(ignore_index, static_cast<int64_t>(parse_reduction("entmax_loss", reduction)), alpha);
  }
  static std::tuple<int64_t, std::string_view, double> numbers(const c10::IValue& saved) {
    constexpr std::string_view kReductions[] = {"none", "mean", "sum"};  // by their codes
    const auto [ignore_index, code, alpha] = saved.to<std::tuple<int64_t, int64_t, double>>();
    return {ignore_index, kReductions[code], alpha};
  }
  const OptionalTensor& tensor() const { return row_alpha; }
};

template <int halves>
struct FixedAlpha : LossOptions {
  static constexpr const char* kName = halves == 4 ? "sparsemax_loss" : "entmax15_loss";
  static constexpr auto kParamsName = halves == 4 ? EntmaxLossName::kSparsemax : EntmaxLossName::kEntmax15;
  static constexpr const char* kSchema = "int ignore_index=-100, str reduction=\"mean\"";
  FixedAlpha(int64_t ignore_index, std::string_view reduction)
      : LossOptions{ignore_index, reduction, halves / 2.0, std::nullopt} {}
  auto fields() const { return std::tie(ignore_index, reduction); }
  static FixedAlpha from_saved(const c10::IValue& saved, const at::Tensor&) {
    const auto [ignore_index, reduction, alpha] = numbers(saved);
    return {ignore_index, reduction};
  }
};
struct AnyAlpha : LossOptions {
  static constexpr const char* kName = "entmax_loss";
  static constexpr auto kParamsName = EntmaxLossName::kEntmax;
  static constexpr const char* kSchema =
      "int ignore_index=-100, str reduction=\"mean\", float alpha=1.5, Tensor? row_alpha=None";
  AnyAlpha(int64_t ignore_index, std::string_view reduction, double alpha, const OptionalTensor& row_alpha)
      : LossOptions{ignore_index, reduction, alpha, row_alpha} {}
  auto fields() const { return std::tie(ignore_index, reduction, alpha, row_alpha); }
  static AnyAlpha from_saved(const c10::IValue& saved, const at::Tensor& row_alpha) {
    const auto [ignore_index, reduction, alpha] = numbers(saved);
    return {ignore_index, reduction, alpha, row_alpha.defined() ? OptionalTensor(row_alpha) : std::nullopt};
  }
};

// ---- the composition ------------------------------------------------------------------------------------------------

// w = (1 - p^c) / c; Σ p w / alpha is Tsallis' entropy of order alpha.
at::Tensor surprise(const at::Tensor& p, const at::Tensor& alpha) {
  const at::Tensor outside = p <= 0, log_p = at::log(p.masked_fill(outside, 1)), t = (alpha - 1) * log_p;
  const at::Tensor is_small = t.abs() < 1e-2, small = at::where(is_small, t, 0), large = at::where(is_small, 1, t);
  const at::Tensor series = 1 + small * (0.5 + small * (1.0 / 6 + small * (1.0 / 24 + small / 120)));
  return (-log_p * at::where(is_small, series, at::expm1(large) / large)).masked_fill(outside, 0);
}

// What the composition and the gradients have in common: logits, targets and probabilities in the type of the loss.
struct Composed {
  int64_t dim;
  bool has_classes;
  at::Tensor ignored, x, p, y, alpha;  // y: class indices with a dimension of size 1, or distributions

  Composed(const at::Tensor& input, const at::Tensor& target, const LossOptions& o)
      : dim(class_dim(input)), has_classes(!target.is_floating_point()) {
    const auto type = accumulate_type(input.scalar_type());
    x = input.to(type);
    alpha = o.row_alpha.has_value() ? o.row_alpha->to(x.device(), type) : at::full({}, o.alpha, x.options());
    // A row of -inf alone has no distribution: its loss and gradient are NaN.
    const at::Tensor is_empty = (x == -std::numeric_limits<double>::infinity()).all(dim, /*keepdim=*/true);
    x = x + is_empty.to(type).masked_fill(is_empty, std::numeric_limits<double>::quiet_NaN());
    if (has_classes) {
      const at::Tensor t = (input.dim() == 1 ? target.reshape({}) : target).to(at::kLong).unsqueeze(dim);
      ignored = t == o.ignore_index;
      y = t.masked_fill(ignored, 0);
      x = x.masked_fill(ignored, 0);
    } else {
      y = target.to(type);
    }
    p = entmax_map(x, dim, o.alpha, o.row_alpha);
  }
  at::Tensor sum(const at::Tensor& t) const { return t.sum(dim, /*keepdim=*/true); }
  // Logits relative to the largest, whose derivative only counts where the sum of a target is not a constant.
  at::Tensor logits() const { return x - (has_classes ? x.detach() : x).amax(dim, /*keepdim=*/true); }
  // t · logits; where t is 0, so is the product, even of -inf.
  at::Tensor times_logits(const at::Tensor& t) const {
    const at::Tensor z = logits();
    return t * z.masked_fill((t == 0) & (z == -std::numeric_limits<double>::infinity()), 0);
  }
  // t · w of t; at 0 with the slope that it has there, 1 / c, where that is finite.
  at::Tensor times_surprise(const at::Tensor& t) const {
    const at::Tensor c = alpha - 1, is_finite = c > 0;
    const at::Tensor slope = at::where(is_finite, 1 / at::where(is_finite, c, 1), 0);
    return at::where(t > 0, t * surprise(t, alpha), t * slope);
  }
  // s of w = s + d: w of the largest probability.
  at::Tensor shift() const { return surprise(p.amax(dim, /*keepdim=*/true), alpha); }
};

at::Tensor reduced(const at::Tensor& rows, const at::Tensor& ignored, int64_t dim, std::string_view reduction) {
  const at::Tensor loss = (ignored.defined() ? rows.masked_fill(ignored, 0) : rows).squeeze(dim);
  if (reduction == "none") return loss;
  if (reduction == "sum") return loss.sum();
  return ignored.defined() ? loss.sum() / ignored.logical_not().sum() : loss.mean();
}

at::Tensor composed_loss(const at::Tensor& input, const at::Tensor& target, const LossOptions& o) {
  const Composed c(input, target, o);
  if (input.sym_numel() == 0)
    return reduced(c.has_classes ? c.sum(c.x) : c.sum(c.x + c.y), c.ignored, c.dim, o.reduction);
  const at::Tensor of_p = c.sum(c.times_logits(c.p)) + c.sum(c.p * surprise(c.p, c.alpha)) / c.alpha;
  at::Tensor of_y;
  if (c.has_classes) {
    of_y = c.logits().gather(c.dim, c.y);
  } else {
    of_y = c.sum(c.times_logits(c.y)) + c.sum(c.times_surprise(c.y)) / c.alpha - c.shift() * (c.sum(c.y) - 1);
  }
  const at::Tensor rows = of_p - of_y;
  return reduced(rows + (rows.clamp_min(0) - rows).detach(), c.ignored, c.dim, o.reduction);  // rounding is not a loss
}

// grad_output for each row, with a dimension of the classes.
at::Tensor row_grads(const at::Tensor& grad_output, const at::Tensor& target, const Composed& c, const LossOptions& o) {
  if (o.reduction == "none") return grad_output.unsqueeze(c.dim);
  if (o.reduction == "sum") return grad_output;
  if (c.has_classes) return grad_output / c.ignored.logical_not().sum();
  return grad_output / c10::multiply_integers(row_sizes(c.x, target));
}

// The gradient of distributions, before grad_output.
at::Tensor target_difference(const Composed& c) {
  const at::Tensor d = c.x.amax(c.dim, /*keepdim=*/true) - c.x;
  const at::Tensor at_zero = at::where(c.alpha > 1, 1 / (c.alpha - 1), std::numeric_limits<double>::infinity());
  const at::Tensor of_y = at::where(c.y > 0, surprise(c.y, c.alpha), at_zero);
  return c.shift() + d - of_y + 1 / c.alpha;
}

// ---- the host -------------------------------------------------------------------------------------------------------

void check(const char* op, const at::Tensor& input, const at::Tensor& target, const LossOptions& o) {
  check_logits(op, input, target);
  parse_reduction(op, o.reduction);
  TSE_CHECK(!target.is_floating_point() || o.ignore_index < 0, op, "ignore_index",
            "expected none (a negative number) with a distribution as target, got ", o.ignore_index);
  TSE_CHECK_VALUE(o.alpha > 0 && std::isfinite(o.alpha), op, "alpha", "expected a positive number, got ", o.alpha);
  check_row_numbers(op, "alpha", o.row_alpha, input, class_dim(input));
  check_targets(op, input, target);
}

// The sizes of the statistics of forward: a RowThreshold for each row.
c10::SymDimVector stats_sizes(const at::Tensor& input, const at::Tensor& target) {
  c10::SymDimVector sizes = row_sizes(input, target);
  sizes.push_back(kThresholdNumbers);
  return sizes;
}

// How many rows of a call a mean counts, as a tensor.
at::Tensor counted_rows(const at::Tensor& input, const at::Tensor& target, const LossOptions& o) {
  if (!target.is_floating_point()) return (target.to(at::kLong) != o.ignore_index).sum();
  return at::full({}, c10::multiply_integers(row_sizes(input, target)), input.options().dtype(at::kDouble));
}

// The rows of a call, in layouts that kernels take.
struct LossRows {
  const char* op;
  RowTensor x, y, grad;
  at::Tensor target, grad_input;
  NumbersOfRows alpha;
  EntmaxLossParams p{};

  template <class Options>
  LossRows(const at::Tensor& input, const at::Tensor& target_, const Options& o, bool has_gradient)
      : op(Options::kName), x(as_rows(input, class_dim(input))), alpha(o.alpha, o.row_alpha, input, class_dim(input)) {
    const int64_t dim = class_dim(input);
    const bool on_cuda = use_cuda(input);
    const bool is_double = input.scalar_type() == at::kDouble || (!on_cuda && is_steep(o.alpha, o.row_alpha));
    p.name = Options::kParamsName;
    p.map.dtype = is_double ? DType::kFloat64 : DType::kFloat32;
    p.map.rows = x.rows;
    p.map.input = x.tensor.const_data_ptr();
    p.map.alpha = alpha.numbers;
    p.dtype = dtype_of(input);
    p.probabilities = fwd_rows_of_alpha;
    p.ignore_index = o.ignore_index;
    double counted = double(row_count(x.rows));
    if (target_.is_floating_point()) {
      y = as_rows(target_.to(input.scalar_type()), dim);
      p.distribution = y.tensor.const_data_ptr();
      p.distribution_rows = y.rows;
    } else {
      target = class_indices(target_).contiguous();
      p.target = target.const_data_ptr();
      p.target_is_int32 = target.scalar_type() == at::kInt;
      if (!on_cuda) counted = count_classes(op, "target", target, input.size(dim), o.ignore_index);
    }
    p.divisor = o.reduction == "mean" && !on_cuda ? counted : 1;  // on CUDA grad_output is divided before
    p.map.output_rows = x.rows;
    if (!has_gradient) return;
    grad_input = with_huge_pages(at::empty_like(input));
    grad = as_rows(grad_input, dim);
    p.map.grad_input_rows = grad.rows;
    p.map.grad_input = grad.tensor.mutable_data_ptr();
  }
  at::ScalarType type() const { return p.map.dtype == DType::kFloat64 ? at::kDouble : at::kFloat; }

  // The loss; on the CPU its gradient with it, if one is wanted.
  void run_forward(const at::Tensor& thresholds) {
    if (!use_cuda(x.tensor)) return run_cpu();
    p.map.thresholds = thresholds.mutable_data_ptr();
    PreparedRowsParams map{};
    map.map = p.map;
    map.input_dtype = map.output_dtype = p.dtype;
    launch(op, launch_prepared_entmax_fwd, map, x.tensor);
    launch(op, launch_entmax_loss_fwd, p, x.tensor);
  }
  void run_backward(const at::Tensor& thresholds) {
    if (!use_cuda(x.tensor)) return run_cpu();
    p.map.thresholds = const_cast<void*>(thresholds.const_data_ptr());
    launch(op, launch_entmax_loss_bwd, p, x.tensor);
    finish();
  }

 private:
  void run_cpu() {
    if (p.map.rows.n > 0) parallel_rows(p, p.map.rows, p.map.rows.stride_n == 1, entmax_loss_rows);
    finish();
  }
  void finish() {
    if (grad_input.defined() && !grad.tensor.is_same(grad_input)) grad_input.copy_(grad.tensor);
  }
};

// The form of a loss (row_loss.h); Options: FixedAlpha or AnyAlpha.
template <class Options_>
struct EntmaxLoss {
  using Options = Options_;

  struct Result {
    at::Tensor loss, stats, grad_input;
  };
  // On the CPU the statistics are zeros: backward computes again what it needs.
  static Result forward_backward(const at::Tensor& input, const at::Tensor& target, const Options& o,
                                 std::optional<double> guess) {
    check(Options::kName, input, target, o);
    const c10::OptionalDeviceGuard guard(input.device());
    const auto type = input.options().dtype(accumulate_type(input.scalar_type()));
    const bool reduces = o.reduction != "none";
    const auto sizes = row_sizes(input, target);
    const at::Tensor stats = at::empty_symint(stats_sizes(input, target), type);
    if (input.is_meta()) return {reduces ? at::empty({}, type) : at::empty_symint(sizes, type), stats, {}};
    if (use_cuda(input) && input.numel() == 0) return {composed_loss(input, target, o), stats.zero_(), {}};
    if (!use_cuda(input) && stats.numel() > 0) std::memset(stats.mutable_data_ptr(), 0, stats.nbytes());
    if (!use_cuda(input) && input.numel() > 0 && is_mixed(o.row_alpha))
      return {loss_of_mixed(input, target, o), stats, {}};
    LossRows rows(input, target, o, !use_cuda(input) && guess.has_value());
    const at::Tensor row_loss = at::empty_symint(sizes, type.dtype(rows.type()));
    if (input.numel() == 0) row_loss.zero_();
    rows.p.row_loss = row_loss.mutable_data_ptr();
    const double g = guess.value_or(0);
    const float g32 = float(g);
    rows.p.grad_output = rows.type() == at::kDouble ? static_cast<const void*>(&g) : &g32;
    rows.run_forward(stats);
    if (!reduces) return {row_loss.to(type.dtype()), stats, {}};
    if (use_cuda(input)) {
      const at::Tensor sum = row_loss.sum(at::kDouble);
      return {(o.reduction == "mean" ? sum / counted_rows(input, target, o) : sum).to(type.dtype()), stats, {}};
    }
    const double sum = rows.type() == at::kDouble ? sum_of_rows(row_loss.const_data_ptr<double>(), row_loss.numel())
                                                  : sum_of_rows(row_loss.const_data_ptr<float>(), row_loss.numel());
    return {at::full({}, sum / rows.p.divisor, type), stats, rows.grad_input};
  }
  static at::Tensor loss_of_mixed(const at::Tensor& input, const at::Tensor& target, const Options& o) {
    Options each = o;
    each.reduction = "none";
    const int64_t dim = class_dim(input);
    const at::Tensor rows =
        by_steepness(each, [&](const Options& same) { return loss(input, target, same).unsqueeze(dim); }).squeeze(dim);
    if (o.reduction == "none") return rows;
    const at::Tensor sum = rows.sum(at::kDouble);
    return (o.reduction == "mean" ? sum / counted_rows(input, target, o) : sum).to(rows.scalar_type());
  }
  static TwoTensors forward(const at::Tensor& input, const at::Tensor& target, const Options& o) {
    const Result r = forward_backward(input, target, o, std::nullopt);
    return {r.loss, r.stats};
  }
  static at::Tensor loss(const at::Tensor& input, const at::Tensor& target, const Options& o) {
    return forward_backward(input, target, o, std::nullopt).loss;
  }

  static at::Tensor gradient(const at::Tensor& grad_output, const at::Tensor& input, const at::Tensor& target,
                             const at::Tensor& stats, const Options& o) {
    check(Options::kName, input, target, o);
    const auto sizes = row_sizes(input, target);
    check_handed(Options::kName, "grad_output", grad_output, input, accumulate_type(input.scalar_type()),
                 o.reduction == "none" ? c10::SymIntArrayRef(sizes) : c10::SymIntArrayRef());
    check_handed(Options::kName, "stats", stats, input, accumulate_type(input.scalar_type()),
                 stats_sizes(input, target));
    if (input.is_meta() || input.numel() == 0) return at::empty_like(input);
    if (!use_cuda(input) && is_mixed(o.row_alpha)) {
      const auto of_rows = [&](const Options& same) { return gradient(grad_output, input, target, stats, same); };
      return at::empty_like(input).copy_(by_steepness(o, of_rows));
    }
    const c10::OptionalDeviceGuard guard(input.device());
    LossRows rows(input, target, o, /*has_gradient=*/true);
    const bool divides = use_cuda(input) && o.reduction == "mean";
    const at::Tensor g =
        (divides ? grad_output / counted_rows(input, target, o) : grad_output).to(rows.type()).contiguous();
    rows.p.grad_output = g.const_data_ptr();
    rows.p.grad_output_stride = o.reduction == "none" ? 1 : 0;
    rows.run_backward(stats.contiguous());
    return rows.grad_input;
  }

  using Op = Operator<loss>;
  using Forward = Operator<forward>;

  static at::Tensor backward(const at::Tensor& grad_output, const at::Tensor& input, const at::Tensor& target,
                             const at::Tensor& stats, const Options& o, const at::Tensor&) {
    return Operator<gradient>::call(grad_output, input, target, stats, o);
  }
  static at::Tensor target_backward(const at::Tensor& grad_output, const at::Tensor& input, const at::Tensor& target,
                                    const at::Tensor&, const Options& o) {
    if (target.sym_numel() == 0) return at::empty_like(target);
    const Composed c(input, target, o);
    return (target_difference(c) * row_grads(grad_output, target, c, o)).to(target.scalar_type());
  }
  static variable_list composed(const at::Tensor& input, const at::Tensor& target, const Options& o, size_t,
                                const at::Tensor&) {
    check(Options::kName, input, target, o);
    return {composed_loss(input, target, o)};
  }
  static bool needs_composition(const at::Tensor&, const Options& o) {
    return o.row_alpha.has_value() && gradient_path(*o.row_alpha) != GradientPath::kNone;
  }
};

template <class Options>
void define_loss(torch::Library& m) {
  using Loss = EntmaxLoss<Options>;
  static const std::string name = Options::kName, forward = "_" + name + "_forward",
                           backward = "_" + name + "_backward";
  const std::string options = Options::kSchema, required = without_defaults(options);
  define_public<Loss::loss, RowLoss<Loss>::autograd>(m, name.c_str(),
                                                     "(Tensor input, Tensor target, " + options + ") -> Tensor");
  define<Loss::forward>(m, forward.c_str(),
                        "(Tensor input, Tensor target, " + required + ") -> (Tensor loss, Tensor stats)");
  define<Loss::gradient>(m, backward.c_str(),
                         "(Tensor grad_output, Tensor input, Tensor target, Tensor stats, " + required + ") -> Tensor");
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(torch_softmax_ext, m) {
  define_loss<FixedAlpha<4>>(m);
  define_loss<FixedAlpha<3>>(m);
  define_loss<AnyAlpha>(m);
}

}  // namespace tse
