// Cross-entropy below autograd: allocation, layouts, rows of the CPU (cross_entropy_threads.cpp) or CUDA launchers.
// [torch]
#include "cross_entropy/cross_entropy.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <c10/core/ScalarType.h>

#include <algorithm>
#include <limits>
#include <tuple>
#include <vector>

#include "common/host.h"
#include "common/targets.h"
#include "cross_entropy/cross_entropy_host.h"

namespace tse {
constexpr const char* kOp = "cross_entropy";

namespace {

// A copy in which a row's classes are contiguous.
at::Tensor classes_last(const at::Tensor& t) {
  return t.movedim(class_dim(t), -1).contiguous().movedim(-1, class_dim(t));
}

// Whether the kernels need the coefficients of all classes (the struct's is_general), and Σ of them in stats.
bool has_mass(const at::Tensor& target, const CrossEntropyOptions& options) {
  return options.label_smoothing != 0 || target.is_floating_point();
}

// The statistics of forward for backward, in one tensor: three doubles (total_weight and guess of CrossEntropyParams),
// then row_m, row_sum, row_others, with has_mass row_mass, and for mean and sum row_loss, in the loss' dtype: each
// tensor more is measurable in a small call. The size in doubles:
constexpr int64_t kStatsOfAll = 3;
c10::SymInt stats_size(c10::SymIntArrayRef row_sizes, bool is_double, bool mass, bool reduce) {
  const int arrays = 3 + mass + reduce;
  return (c10::multiply_integers(row_sizes) * arrays + !is_double) / (is_double ? 1 : 2) + kStatsOfAll;
}

enum class Gradient { kNone, kNew, kInPlace };

// The tensors of a call in layouts that the kernels support: in logits and gradient alike, the classes of a row are
// contiguous, or the rows at a class. Else they are copied; on CUDA also where an option needs contiguous classes. The
// layout is chosen with and without a gradient, so that the losses of rows have the same bits in both.
struct Layouts {
  RowTensor input, grad, probabilities;
  at::Tensor grad_input;  // what the caller gets
  at::Tensor target, weight;

  // `buffer`: memory for a new gradient, where the caller has some.
  Layouts(const at::Tensor& logits, const at::Tensor& target_, const CrossEntropyOptions& options, Gradient gradient,
          bool contiguous_classes, const at::Tensor& buffer = {})
      : input(as_rows(logits, class_dim(logits))) {
    const int64_t dim = class_dim(logits);
    if (target_.is_floating_point()) {
      TSE_CHECK(target_.scalar_type() == logits.scalar_type(), kOp, "target",
                "expected probabilities in input's dtype ", logits.scalar_type(), ", got ", target_.scalar_type());
    } else {
      target = class_indices(target_).contiguous();
    }
    if (options.weight.has_value()) weight = options.weight->to(accumulate_type(logits.scalar_type())).contiguous();
    const bool columns = input.rows.stride_inner == 1 && input.tensor.is_non_overlapping_and_dense();
    contiguous_classes |= input.rows.n > std::numeric_limits<int32_t>::max();
    if (input.rows.stride_n != 1 && (contiguous_classes || !columns))
      input = as_rows(contiguous_classes ? classes_last(logits) : input.tensor.contiguous(), dim);
    if (!target.defined()) {
      probabilities = as_rows(target_, dim);
      const bool readable =  // where rows are contiguous, either layout is
          probabilities.rows.stride_n == 1 || (input.rows.stride_n != 1 && probabilities.rows.stride_inner == 1);
      if (!readable) probabilities = as_rows(classes_last(target_), dim);
    }
    if (gradient == Gradient::kNone) return;
    if (gradient == Gradient::kInPlace) {
      grad_input = logits;
      grad = input;
      return;
    }
    grad_input = buffer.defined() ? buffer : with_huge_pages(at::empty_like(logits));
    grad = as_rows(grad_input, dim);
    const bool alike = input.rows.stride_n == 1 ? grad.rows.stride_n == 1 : grad.rows.stride_inner == 1;
    if (alike) return;
    if (input.rows.stride_n != 1) {
      grad = as_rows(at::empty_like(input.tensor), dim);
    } else {  // the gradient is dense where the logits are expanded: classes innermost in it, too
      std::vector<int64_t> sizes = logits.sizes().vec();
      sizes.erase(sizes.begin() + dim);
      sizes.push_back(input.rows.n);
      grad = as_rows(at::empty(sizes, logits.options()).movedim(-1, dim), dim);
    }
  }

  CrossEntropyParams params(const CrossEntropyOptions& options, const at::Tensor& stats) const {
    CrossEntropyParams p{};
    p.dtype = dtype_of(input.tensor);
    p.rows = input.rows;
    p.image = c10::multiply_integers(input.tensor.sizes().slice(class_dim(input.tensor) + 1));
    p.input = input.tensor.const_data_ptr();
    if (target.defined()) {
      p.target = target.const_data_ptr();
      p.target_is_int32 = target.scalar_type() == at::kInt;
    } else {
      p.probabilities = probabilities.tensor.const_data_ptr();
      p.probabilities_rows = probabilities.rows;
    }
    p.ignore_index = options.ignore_index;
    p.reduction = parse_reduction(kOp, options.reduction);
    p.weight = weight.defined() ? weight.const_data_ptr() : nullptr;
    p.label_smoothing = options.label_smoothing;
    p.z_loss_weight = options.z_loss_weight;
    p.transform = {options.temperature, options.softcap.value_or(0)};
    const int64_t array = row_count(p.rows) * (p.dtype == DType::kFloat64 ? 8 : 4);
    p.total_weight = const_cast<double*>(stats.const_data_ptr<double>());
    p.guess = p.total_weight + 2;
    p.row_m = p.total_weight + kStatsOfAll;
    p.row_sum = static_cast<char*>(p.row_m) + array;
    p.row_others = static_cast<char*>(p.row_sum) + array;
    p.row_loss = static_cast<char*>(p.row_others) + array;
    if ((options.label_smoothing != 0 || p.probabilities != nullptr) && p.rows.n > 0) {  // of no classes lse is -inf
      p.row_mass = p.row_loss;
      p.row_loss = static_cast<char*>(p.row_mass) + array;
    }
    if (grad.tensor.defined()) {
      p.grad_rows = grad.rows;
      p.grad_input = grad.tensor.mutable_data_ptr();
    }
    return p;
  }

  // Whether the kernels write into what the caller gets.
  bool is_direct() const { return grad.tensor.is_same(grad_input); }

  at::Tensor finished_grad() const {
    if (!is_direct()) grad_input.copy_(grad.tensor);
    return grad_input;
  }
};

// Whether the kernels have these options only where a row's classes are contiguous.
bool needs_contiguous_classes(const at::Tensor& input, const at::Tensor& target, const CrossEntropyOptions& options,
                              bool metrics_or_their_gradient) {
  return use_cuda(input) && (metrics_or_their_gradient || options.softcap.has_value() || has_mass(target, options));
}

// The results of forward, to be filled in. Sizes may be symbolic.
CrossEntropyResult allocated(const at::Tensor& input, const at::Tensor& target, const CrossEntropyOptions& options,
                             bool metrics) {
  const auto type =
      target.is_floating_point() ? c10::promoteTypes(input.scalar_type(), target.scalar_type()) : input.scalar_type();
  const auto loss_options = input.options().dtype(accumulate_type(type));
  const auto sizes = row_sizes(input, target);
  const bool reduce = options.reduction != "none";
  CrossEntropyResult r;
  r.loss = reduce ? at::empty({}, loss_options) : at::empty_symint(sizes, loss_options);
  r.stats =
      at::empty_symint({stats_size(sizes, loss_options.dtype() == at::kDouble, has_mass(target, options), reduce)},
                       input.options().dtype(at::kDouble));
  if (metrics) {
    r.predictions = at::empty_symint(sizes, input.options().dtype(at::kLong));
    r.z_loss = at::empty_like(r.loss);
  }
  return r;
}

// CPU: the number of targets that count. One that is no class raises.
double count_targets(const at::Tensor& indices, const at::Tensor& input, const CrossEntropyOptions& options) {
  return count_classes(kOp, "target", indices, input.size(class_dim(input)), options.ignore_index);
}

CrossEntropyResult run_forward(const at::Tensor& input, const at::Tensor& target, const CrossEntropyOptions& options,
                               Gradient gradient = Gradient::kNone, std::optional<double> grad_output = {},
                               bool metrics = false) {
  check_cross_entropy(input, target, options);
  const bool is_meta = input.is_meta();
  if (!is_meta && needs_promotion(input, target)) {
    const auto [x, t] = promoted(input, target);
    return run_forward(x, t, options, gradient, grad_output, metrics);
  }
  const c10::OptionalDeviceGuard guard(input.device());
  CrossEntropyResult r = allocated(input, target, options, metrics);
  if (is_meta) return r;
  const Layouts layouts(input, target, options, gradient, needs_contiguous_classes(input, target, options, metrics));
  CrossEntropyParams p = layouts.params(options, r.stats);
  const bool reduce = p.reduction != Reduction::kNone;
  if (!reduce) p.row_loss = r.loss.mutable_data_ptr();
  else if (use_cuda(input)) p.row_loss = nullptr;
  p.loss = reduce ? r.loss.mutable_data_ptr() : nullptr;
  if (metrics) {
    p.predictions = r.predictions.mutable_data_ptr<int64_t>();
    p.z_loss = reduce ? r.z_loss.zero_().mutable_data_ptr() : nullptr;
  }
  if (use_cuda(input)) {
    // A grad_output that the caller does not know, the device guesses: where the kernels write what the caller gets.
    p.fixed_grad_output = grad_output.value_or(0);
    if (gradient == Gradient::kInPlace) p.assumed = Assumed::kGuessedOrOne;
    else if (gradient == Gradient::kNew && layouts.is_direct()) p.assumed = Assumed::kGuessed;
    if (gradient != Gradient::kNone && grad_output.has_value()) p.assumed = Assumed::kFixed;
    const int64_t bytes = cross_entropy_scratch(p);
    at::Tensor sums;
    if (bytes > 0) sums = at::empty({bytes}, input.options().dtype(at::kByte));
    if (bytes > 0) p.sums = static_cast<CrossEntropySums*>(sums.mutable_data_ptr());
    launch_cross_entropy_fwd(p, current_stream(input));
    if (p.assumed != Assumed::kNone) r.grad_input = layouts.finished_grad();
    return r;
  }
  p.total_weight[1] = layouts.target.defined() ? count_targets(layouts.target, input, options)
                      : p.rows.n == 0          ? 0  // of no classes the mean is NaN
                                               : double(row_count(p.rows));
  const double factor = grad_output.value_or(0);
  const float factor32 = float(factor);
  p.grad_output = p.dtype == DType::kFloat64 ? static_cast<const void*>(&factor) : &factor32;
  run_cross_entropy_fwd(p, /*with_gradient=*/gradient != Gradient::kNone);
  if (gradient != Gradient::kNone) r.grad_input = layouts.finished_grad();
  return r;
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> cross_entropy_forward(const at::Tensor& input, const at::Tensor& target,
                                                         const CrossEntropyOptions& options) {
  const CrossEntropyResult r = run_forward(input, target, options);
  return {r.loss, r.stats};
}

at::Tensor cross_entropy_backward(const at::Tensor& grad_output, const OptionalTensor& grad_lse,
                                  const at::Tensor& input, const at::Tensor& target, const at::Tensor& stats,
                                  const CrossEntropyOptions& options) {
  check_cross_entropy(input, target, options);
  if (target.is_floating_point()) check_handed(kOp, "target", target, input, input.scalar_type(), input.sym_sizes());
  const auto type = accumulate_type(input.scalar_type());
  const auto sizes = row_sizes(input, target);
  const bool reduce = parse_reduction(kOp, options.reduction) != Reduction::kNone;
  check_handed(kOp, "grad_output", grad_output, input, type, reduce ? c10::SymIntArrayRef() : sizes);
  if (grad_lse.has_value()) check_handed(kOp, "grad_lse", *grad_lse, input, type, sizes);
  const c10::SymInt size = stats_size(sizes, type == at::kDouble, has_mass(target, options), reduce);
  check_handed(kOp, "stats", stats, input, at::kDouble, {&size, 1});
  if (input.is_meta()) return at::empty_like(input);
  if (!use_cuda(input) && !target.is_floating_point())
    count_targets(class_indices(target).contiguous(), input, options);
  return cross_entropy_gradient(grad_output, grad_lse, input, target, stats.contiguous(), options);
}

StatsAndMetrics cross_entropy_metrics_forward(const at::Tensor& input, const at::Tensor& target,
                                              const CrossEntropyOptions& options) {
  TSE_CHECK(input.is_meta() || input.dim() == 0 || input.size(class_dim(input)) > 0, kOp, "input",
            "expected at least one class to predict, got shape ", input.sizes());
  const CrossEntropyResult r = run_forward(input, target, options, Gradient::kNone, {}, /*metrics=*/true);
  const auto type = r.loss.scalar_type();
  if (input.is_meta()) {
    const at::Tensor accuracy = at::empty({}, input.options().dtype(at::kFloat));
    return {r.loss, r.stats, r.z_loss, at::empty_like(r.predictions, r.loss.options()), accuracy, r.predictions};
  }
  const int64_t count = r.predictions.numel();
  const at::Tensor sums = r.stats.slice(0, kStatsOfAll).view(type);
  const at::Tensor m = sums.slice(0, 0, count), sum = sums.slice(0, count, 2 * count);
  const double slope = LogitTransform{options.temperature, options.softcap.value_or(0)}.slope();
  at::Tensor lse = m.mul(slope).add_(sum.log()).reshape(r.predictions.sizes());
  at::Tensor right;
  if (target.is_floating_point()) {
    right = r.predictions == target.argmax(class_dim(input));
  } else {
    const at::Tensor indices = target.to(at::kLong).reshape(lse.sizes());  // ignore_index may need 64 bits
    const at::Tensor ignored = indices == options.ignore_index;
    lse.masked_fill_(ignored, 0);
    right = (r.predictions == indices).logical_and_(ignored.logical_not());
  }
  const at::Tensor accuracy = right.sum().to(at::kDouble).div_(r.stats[1]).to(at::kFloat);
  const at::Tensor z_loss = options.reduction != "none" ? r.z_loss : lse.square().mul_(options.z_loss_weight);
  return {r.loss, r.stats, z_loss, lse, accuracy, r.predictions};
}

// ---- for autograd and the linear loss ------------------------------------------------------------------------------

at::Tensor cross_entropy_gradient(const at::Tensor& grad_output, const OptionalTensor& grad_lse,
                                  const at::Tensor& input, const at::Tensor& target, const at::Tensor& stats,
                                  const CrossEntropyOptions& options, const at::Tensor& written) {
  const c10::OptionalDeviceGuard guard(input.device());
  const Layouts layouts(input, target, options, Gradient::kNew,
                        needs_contiguous_classes(input, target, options, grad_lse.has_value()), written);
  CrossEntropyParams p = layouts.params(options, stats);
  p.compare_guess = written.defined();
  // A gradient that is one number expanded over the rows, as sum() sends it back, is read as that one number.
  const auto is_zero = [](int64_t stride) { return stride == 0; };
  const auto strides = grad_output.strides();
  const bool one_number = p.reduction != Reduction::kNone || std::all_of(strides.begin(), strides.end(), is_zero);
  const at::Tensor g = one_number ? grad_output : grad_output.contiguous();
  p.grad_output = g.const_data_ptr();
  p.grad_output_stride = one_number ? 0 : 1;
  const at::Tensor g_lse = grad_lse.has_value() ? grad_lse->contiguous() : at::Tensor();
  if (grad_lse.has_value()) p.grad_lse = g_lse.const_data_ptr();
  if (use_cuda(input)) {
    launch_cross_entropy_bwd(p, current_stream(input));
  } else {
    run_cross_entropy_rows(p, /*forward=*/false, /*backward=*/true);
  }
  return layouts.finished_grad();
}

CrossEntropyResult cross_entropy_forward_backward(const at::Tensor& input, const at::Tensor& target,
                                                  const CrossEntropyOptions& options, std::optional<double> grad_output,
                                                  bool in_place) {
  if (in_place) check_writable(input, target, options);
  return run_forward(input, target, options, in_place ? Gradient::kInPlace : Gradient::kNew, grad_output);
}

void cross_entropy_rescale(const at::Tensor& written, const at::Tensor& grad_output, const at::Tensor& stats,
                           std::string_view reduction) {
  const c10::OptionalDeviceGuard guard(written.device());
  const auto rows = try_rows(written, class_dim(written));
  if (!rows.has_value()) {
    written.mul_(grad_output / stats.select(0, 2));
    return;
  }
  CrossEntropyParams p{};
  p.dtype = dtype_of(written);
  p.rows = p.grad_rows = *rows;
  p.grad_input = written.mutable_data_ptr();
  p.reduction = parse_reduction(kOp, reduction);
  p.grad_output = grad_output.const_data_ptr();
  p.guess = const_cast<double*>(stats.const_data_ptr<double>()) + 2;
  launch_cross_entropy_rescale(p, current_stream(written));
}

}  // namespace tse
