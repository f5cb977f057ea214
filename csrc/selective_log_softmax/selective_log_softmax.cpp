// Selective log-softmax: the operators. [torch]
#include "selective_log_softmax/selective_log_softmax.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/logsumexp.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <array>
#include <limits>
#include <optional>
#include <tuple>

#include "common/autograd.h"
#include "common/host.h"
#include "common/operator.h"
#include "common/python.h"
#include "common/row_loss.h"
#include "common/targets.h"

namespace tse {
namespace {

using torch::autograd::variable_list;
using TwoTensors = std::tuple<at::Tensor, at::Tensor>;
using ThreeTensors = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

constexpr const char* kOp = "selective_log_softmax";
constexpr Kernels<SelectiveLogSoftmaxParams> kForward = {selective_log_softmax_fwd_rows,
                                                         launch_selective_log_softmax_fwd};
constexpr Kernels<SelectiveLogSoftmaxParams> kBackward = {selective_log_softmax_bwd_rows,
                                                          launch_selective_log_softmax_bwd};

struct Options {
  double temperature = 1;
  std::optional<double> softcap;

  static constexpr const char* kSchema = "float temperature=1.0, float? softcap=None";
  auto fields() const { return std::tie(temperature, softcap); }

  c10::IValue saved() const { return std::make_tuple(temperature, softcap); }
  static Options from_saved(const c10::IValue& saved, const at::Tensor&) {
    const auto [temperature, softcap] = saved.to<std::tuple<double, std::optional<double>>>();
    return {temperature, softcap};
  }
};

// ---- the host: checks, allocation, rows of the CPU or the CUDA launcher ---------------------------------------------

void check(const at::Tensor& input, const at::Tensor& index, const Options& options) {
  check_floating(kOp, "input", input);
  check_same_device(kOp, "index", index, input);
  const auto x = input.sym_sizes(), i = index.sym_sizes();
  TSE_CHECK(!x.empty(), kOp, "input", "expected (…, C), got a scalar");
  TSE_CHECK(index.scalar_type() == at::kLong || index.scalar_type() == at::kInt, kOp, "index",
            "expected int64 or int32, got ", index.scalar_type());
  const bool fits = i.size() == x.size() || i.size() + 1 == x.size();
  TSE_CHECK(fits && same_sizes(x.slice(0, x.size() - 1), i.slice(0, x.size() - 1)), kOp, "index",
            "expected the shape of input without its last dimension, or with K in its place, input ", x, ", got ", i);
  check_transform(kOp, options.softcap, options.temperature);
}

// What backward is handed.
void check_backward(const OptionalTensor& grad_logp, const OptionalTensor& grad_entropy, const at::Tensor& input,
                    const at::Tensor& index, const at::Tensor& stats, const Options& options) {
  check(input, index, options);
  const auto type = accumulate_type(input.scalar_type());
  const auto rows = input.sym_sizes().slice(0, input.dim() - 1);
  if (grad_logp.has_value()) check_handed(kOp, "grad_logp", *grad_logp, input, type, index.sym_sizes());
  if (grad_entropy.has_value()) check_handed(kOp, "grad_entropy", *grad_entropy, input, type, rows);
  const bool entropy = stats.dim() == 2 && stats.sym_size(0) == 4;
  TSE_CHECK(entropy || !grad_entropy.has_value(), kOp, "stats", "expected those of a forward with entropy, got shape ",
            stats.sym_sizes());
  const c10::SymInt sizes[] = {entropy ? 4 : 3, c10::multiply_integers(rows)};
  check_handed(kOp, "stats", stats, input, type, sizes);
}

// The tensors of a call in layouts that the kernels support: on the CPU a row's classes are contiguous.
struct Layouts {
  RowTensor input;
  at::Tensor index;
  Layouts(const at::Tensor& logits, const at::Tensor& index_)
      : input(as_rows(logits, logits.dim() - 1)), index(index_.contiguous()) {
    if (use_cuda(logits)) return;
    if (input.rows.stride_n != 1) input = as_rows(logits.contiguous(), logits.dim() - 1);
    count_classes(kOp, "index", index, input.rows.n, /*ignore_index=*/std::nullopt, /*per_row=*/k());
  }

  int64_t k() const { return index.dim() == input.tensor.dim() ? index.size(-1) : 1; }

  // Of statistics (3 or 4, rows): m, sum, others and, with entropy, mean.
  SelectiveLogSoftmaxParams params(const at::Tensor& stats, const Options& options) const {
    SelectiveLogSoftmaxParams p{};
    p.dtype = dtype_of(input.tensor);
    p.rows = input.rows;
    p.input = input.tensor.const_data_ptr();
    p.index = index.const_data_ptr();
    p.index_is_int32 = index.scalar_type() == at::kInt;
    p.k = k();
    p.transform = {options.temperature, options.softcap.value_or(0)};
    char* data = static_cast<char*>(const_cast<void*>(stats.const_data_ptr()));
    const int64_t array = row_count(p.rows) * stats.element_size();
    p.row_m = data;
    p.row_sum = data + array;
    p.row_others = data + 2 * array;
    if (stats.size(0) == 4) p.row_mean = data + 3 * array;
    return p;
  }
};

ThreeTensors forward(const at::Tensor& input, const at::Tensor& index, bool entropy, const Options& options) {
  check(input, index, options);
  const c10::OptionalDeviceGuard guard(input.device());
  const auto type = input.options().dtype(accumulate_type(input.scalar_type()));
  const auto rows = input.sym_sizes().slice(0, input.dim() - 1);
  const at::Tensor logp = at::empty_symint(index.sym_sizes(), type);
  const at::Tensor h = entropy ? at::empty_symint(rows, type) : at::empty({0}, type);
  const at::Tensor stats = at::empty_symint({entropy ? 4 : 3, c10::multiply_integers(rows)}, type);
  if (input.is_meta()) return {logp, h, stats};
  const Layouts layouts(input, index);
  SelectiveLogSoftmaxParams p = layouts.params(stats, options);
  p.logp = logp.mutable_data_ptr();
  if (entropy) p.entropy = h.mutable_data_ptr();
  kForward.run(kOp, p, p.rows, /*contiguous=*/true, input);
  return {logp, h, stats};
}

at::Tensor backward(const OptionalTensor& grad_logp, const OptionalTensor& grad_entropy, const at::Tensor& input,
                    const at::Tensor& index, const at::Tensor& stats, const Options& options) {
  check_backward(grad_logp, grad_entropy, input, index, stats, options);
  const c10::OptionalDeviceGuard guard(input.device());
  const at::Tensor grad_input = with_huge_pages(at::empty_like(input));
  if (input.is_meta() || input.numel() == 0) return grad_input;
  const Layouts layouts(input, index);
  RowTensor grad = as_rows(grad_input, input.dim() - 1);
  if (grad.rows.stride_n != 1 && !use_cuda(input))
    grad = as_rows(at::empty(input.sizes(), input.options()), input.dim() - 1);
  const at::Tensor dense_stats = stats.contiguous();
  SelectiveLogSoftmaxParams p = layouts.params(dense_stats, options);
  p.grad_rows = grad.rows;
  p.grad_input = grad.tensor.mutable_data_ptr();
  const at::Tensor g = grad_logp.has_value() ? grad_logp->contiguous() : at::Tensor();
  const at::Tensor g_entropy = grad_entropy.has_value() ? grad_entropy->contiguous() : at::Tensor();
  if (g.defined()) p.grad_logp = g.const_data_ptr();
  if (g_entropy.defined()) p.grad_entropy = g_entropy.const_data_ptr();
  kBackward.run(kOp, p, p.rows, /*contiguous=*/true, input);
  if (!grad.tensor.is_same(grad_input)) grad_input.copy_(grad.tensor);
  return grad_input;
}

at::Tensor log_probability(const at::Tensor& input, const at::Tensor& index, const Options& options) {
  return std::get<0>(forward(input, index, /*entropy=*/false, options));
}
TwoTensors with_entropy(const at::Tensor& input, const at::Tensor& index, const Options& options) {
  const auto [logp, entropy, stats] = forward(input, index, /*entropy=*/true, options);
  return {logp, entropy};
}

// ---- autograd -------------------------------------------------------------------------------------------------------

// {log-probabilities}, or {log-probabilities, entropy}.
variable_list composed(const at::Tensor& input, const at::Tensor& index, bool entropy, const Options& options) {
  const at::Tensor s = transformed(input, options.softcap, options.temperature);
  const bool one = index.dim() < input.dim();
  const at::Tensor i = (one ? index.unsqueeze(-1) : index).to(at::kLong);
  const at::Tensor lse = at::logsumexp(s, -1, /*keepdim=*/true);
  const at::Tensor at_index = s.gather(-1, i) - lse;
  variable_list r = {one ? at_index.squeeze(-1) : at_index};
  if (entropy) {
    const at::Tensor logp = s - lse;
    const at::Tensor finite = logp.masked_fill(logp == -std::numeric_limits<double>::infinity(), 0);  // 0 · log 0 = 0
    r.push_back(-(logp.exp() * finite).sum(-1));
  }
  return r;
}

template <bool kEntropy>
struct SelectiveLogSoftmax {
  using Options = tse::Options;
  static constexpr size_t kSaved = 3;  // input, index, stats

  static RowForward forward(const at::Tensor& input, const at::Tensor& index, const Options& options) {
    const auto [logp, h, stats] = Operator<tse::forward>::call(input, index, kEntropy, options);
    return {kEntropy ? variable_list{logp, h} : variable_list{logp}, {}, {stats}};
  }

  static variable_list backward(variable_list grads, const variable_list& saved, const Options& options,
                                std::array<bool, 2>) {
    grads.resize(2);
    const auto optional = [](const at::Tensor& g) { return g.defined() ? OptionalTensor(g) : std::nullopt; };
    const auto g = optional(grads[0]), g_entropy = optional(grads[1]);
    return {Operator<tse::backward>::call(g, g_entropy, saved[0], saved[1], saved[2], options)};
  }

  static variable_list composed(const at::Tensor& input, const at::Tensor& index, const Options& options, size_t,
                                const at::Tensor&) {
    return tse::composed(input, index, kEntropy, options);
  }
};

at::Tensor log_probability_autograd(const at::Tensor& input, const at::Tensor& index, const Options& options) {
  const GradientPath path = gradient_path(input);
  if (path == GradientPath::kFused) return RowResults<SelectiveLogSoftmax<false>>::apply(input, index, options)[0];
  if (path == GradientPath::kComposed) return composed(input, index, false, options)[0];
  return Operator<log_probability>::call(input, index, options);
}

TwoTensors with_entropy_autograd(const at::Tensor& input, const at::Tensor& index, const Options& options) {
  const GradientPath path = gradient_path(input);
  if (path == GradientPath::kNone) return Operator<with_entropy>::call(input, index, options);
  const variable_list r = path == GradientPath::kFused
                              ? RowResults<SelectiveLogSoftmax<true>>::apply(input, index, options)
                              : composed(input, index, true, options);
  return {r[0], r[1]};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(torch_softmax_ext, m) {
  const std::string options = Options::kSchema, required = without_defaults(options);
  const std::string arguments = "(Tensor input, Tensor index, *, " + options + ") -> ";
  define_public<log_probability, log_probability_autograd>(m, kOp, arguments + "Tensor");
  define_public<with_entropy, with_entropy_autograd>(m, "selective_log_softmax_with_entropy",
                                                     arguments + "(Tensor logp, Tensor entropy)");
  define<forward>(
      m, "_selective_log_softmax_forward",
      "(Tensor input, Tensor index, bool entropy, " + required + ") -> (Tensor logp, Tensor entropy, Tensor stats)");
  define<backward>(m, "_selective_log_softmax_backward",
                   "(Tensor? grad_logp, Tensor? grad_entropy, Tensor input, Tensor index, Tensor stats, " + required +
                       ") -> Tensor");
}

}  // namespace tse
