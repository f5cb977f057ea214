// Host entries of selective log-softmax: schema, checks, allocation, dispatch to CPU rows or CUDA launchers. [torch]
#include "selective_log_softmax/selective_log_softmax.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <tuple>

#include "common/host.h"

namespace tse {
namespace {

constexpr const char* kOp = "selective_log_softmax";
using OptionalTensor = std::optional<at::Tensor>;
using ThreeTensors = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

void check(const at::Tensor& input, const at::Tensor& index, double temperature, std::optional<double> softcap) {
  check_floating(kOp, "input", input);
  check_same_device(kOp, "index", index, input);
  const auto x = input.sym_sizes(), i = index.sym_sizes();
  TSE_CHECK(!x.empty(), kOp, "input", "expected (…, C), got a scalar");
  TSE_CHECK(index.scalar_type() == at::kLong || index.scalar_type() == at::kInt, kOp, "index",
            "expected int64 or int32, got ", index.scalar_type());
  bool same = i.size() == x.size() || i.size() + 1 == x.size();
  for (size_t d = 0; same && d + 1 < x.size(); ++d) same = x[d].sym_eq(i[d]).expect_true(__FILE__, __LINE__);
  TSE_CHECK(same, kOp, "index",
            "expected the shape of input without its last dimension, or with K in its place, input ", x, ", got ", i);
  check_transform(kOp, softcap, temperature);
}

// What backward is handed.
void check_backward(const OptionalTensor& grad_logp, const OptionalTensor& grad_entropy, const at::Tensor& input,
                    const at::Tensor& index, const at::Tensor& stats, double temperature,
                    std::optional<double> softcap) {
  check(input, index, temperature, softcap);
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

// An index that is no class raises before anything is written.
template <class Index>
void check_indices(const Index* index, int64_t rows, int64_t k, int64_t classes) {
  const Index* end = index + rows * k;
  const Index* bad = std::find_if(index, end, [&](int64_t v) { return v < 0 || v >= classes; });
  if (bad == end) return;
  TSE_CHECK_INDEX(false, kOp, "index", "expected a class in [0, ", classes, "), got ", int64_t(*bad), " at row ",
                  (bad - index) / k);
}

void check_indices(const SelectiveLogSoftmaxParams& p) {
  const int64_t rows = row_count(p.rows);
  if (p.index_is_int32) check_indices(static_cast<const int32_t*>(p.index), rows, p.k, p.rows.n);
  else check_indices(static_cast<const int64_t*>(p.index), rows, p.k, p.rows.n);
}

// The tensors of a call in forms that the kernels can walk; the CPU's rows have their classes next to each other.
struct Operands {
  RowTensor input;
  at::Tensor index;
  Operands(const at::Tensor& logits, const at::Tensor& index_)
      : input(as_rows(logits, logits.dim() - 1)), index(index_.contiguous()) {
    if (input.rows.stride_n != 1 && !use_cuda(logits)) input = as_rows(logits.contiguous(), logits.dim() - 1);
  }

  // Of statistics (3 or 4, rows): m, sum, others and, with entropy, mean.
  SelectiveLogSoftmaxParams params(const at::Tensor& stats, double temperature, std::optional<double> softcap) const {
    SelectiveLogSoftmaxParams p{};
    p.dtype = dtype_of(input.tensor);
    p.rows = input.rows;
    p.input = input.tensor.const_data_ptr();
    p.index = index.const_data_ptr();
    p.index_is_int32 = index.scalar_type() == at::kInt;
    p.k = index.dim() == input.tensor.dim() ? index.size(-1) : 1;
    p.transform = {temperature, softcap.value_or(0)};
    char* data = static_cast<char*>(const_cast<void*>(stats.const_data_ptr()));
    const int64_t array = row_count(p.rows) * stats.element_size();
    p.row_m = data;
    p.row_sum = data + array;
    p.row_others = data + 2 * array;
    if (stats.size(0) == 4) p.row_mean = data + 3 * array;
    return p;
  }
};

ThreeTensors selective_log_softmax_forward(const at::Tensor& input, const at::Tensor& index, double temperature,
                                           std::optional<double> softcap, bool entropy) {
  check(input, index, temperature, softcap);
  const c10::OptionalDeviceGuard guard(input.device());
  const Operands operands(input, index);
  const int64_t rows = row_count(operands.input.rows);
  const auto options = input.options().dtype(accumulate_type(input.scalar_type()));
  const at::Tensor stats = at::empty({entropy ? 4 : 3, rows}, options);
  SelectiveLogSoftmaxParams p = operands.params(stats, temperature, softcap);
  if (!use_cuda(input)) check_indices(p);
  const at::Tensor logp = at::empty(index.sizes(), options);
  const at::Tensor h = entropy ? at::empty(input.sizes().slice(0, input.dim() - 1), options) : at::empty({0}, options);
  p.logp = logp.mutable_data_ptr();
  if (entropy) p.entropy = h.mutable_data_ptr();
  if (use_cuda(input)) {
    if constexpr (kHasCuda) launch_selective_log_softmax_fwd(p, current_stream(input));
  } else {
    parallel_rows(p.rows, [&](int64_t begin, int64_t end) { selective_log_softmax_fwd_rows(p, begin, end); });
  }
  return {logp, h, stats};
}

at::Tensor selective_log_softmax_backward(const OptionalTensor& grad_logp, const OptionalTensor& grad_entropy,
                                          const at::Tensor& input, const at::Tensor& index, const at::Tensor& stats,
                                          double temperature, std::optional<double> softcap) {
  check_backward(grad_logp, grad_entropy, input, index, stats, temperature, softcap);
  const c10::OptionalDeviceGuard guard(input.device());
  const Operands operands(input, index);
  const at::Tensor grad_input = with_huge_pages(at::empty_like(input));
  if (input.numel() == 0) return grad_input;
  RowTensor grad = as_rows(grad_input, input.dim() - 1);
  if (grad.rows.stride_n != 1 && !use_cuda(input))
    grad = as_rows(at::empty(input.sizes(), input.options()), input.dim() - 1);
  const at::Tensor dense_stats = stats.contiguous();
  SelectiveLogSoftmaxParams p = operands.params(dense_stats, temperature, softcap);
  if (!use_cuda(input)) check_indices(p);
  p.grad_rows = grad.rows;
  p.grad_input = grad.tensor.mutable_data_ptr();
  const at::Tensor g = grad_logp.has_value() ? grad_logp->contiguous() : at::Tensor();
  const at::Tensor g_entropy = grad_entropy.has_value() ? grad_entropy->contiguous() : at::Tensor();
  if (g.defined()) p.grad_logp = g.const_data_ptr();
  if (g_entropy.defined()) p.grad_entropy = g_entropy.const_data_ptr();
  if (use_cuda(input)) {
    if constexpr (kHasCuda) launch_selective_log_softmax_bwd(p, current_stream(input));
  } else {
    parallel_rows(p.rows, [&](int64_t begin, int64_t end) { selective_log_softmax_bwd_rows(p, begin, end); });
  }
  if (!grad.tensor.is_same(grad_input)) grad_input.copy_(grad.tensor);
  return grad_input;
}

// ---- shapes only: fake tensors, whose sizes may be symbolic -------------------------------------------------------

ThreeTensors selective_log_softmax_forward_meta(const at::Tensor& input, const at::Tensor& index, double temperature,
                                                std::optional<double> softcap, bool entropy) {
  check(input, index, temperature, softcap);
  const auto options = input.options().dtype(accumulate_type(input.scalar_type()));
  const auto sizes = input.sym_sizes().slice(0, input.dim() - 1);
  return {at::empty_symint(index.sym_sizes(), options),
          entropy ? at::empty_symint(sizes, options) : at::empty({0}, options),
          at::empty_symint({entropy ? 4 : 3, c10::multiply_integers(sizes)}, options)};
}

at::Tensor selective_log_softmax_backward_meta(const OptionalTensor& grad_logp, const OptionalTensor& grad_entropy,
                                               const at::Tensor& input, const at::Tensor& index,
                                               const at::Tensor& stats, double temperature,
                                               std::optional<double> softcap) {
  check_backward(grad_logp, grad_entropy, input, index, stats, temperature, softcap);
  return at::empty_like(input);
}

// ---- both -----------------------------------------------------------------------------------------------------------

template <auto forward>
at::Tensor selective_log_softmax(const at::Tensor& input, const at::Tensor& index, double temperature,
                                 std::optional<double> softcap) {
  return std::get<0>(forward(input, index, temperature, softcap, false));
}

template <auto forward>
std::tuple<at::Tensor, at::Tensor> selective_log_softmax_with_entropy(const at::Tensor& input, const at::Tensor& index,
                                                                      double temperature,
                                                                      std::optional<double> softcap) {
  const auto [logp, entropy, stats] = forward(input, index, temperature, softcap, true);
  return {logp, entropy};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(torch_softmax_ext, m) {
  const std::vector<at::Tag> tags = {at::Tag::pt2_compliant_tag};
  const std::string arguments = "(Tensor input, Tensor index, *, float temperature=1.0, float? softcap=None) -> ";
  m.def(("selective_log_softmax" + arguments + "Tensor").c_str(), tags);
  m.def(("selective_log_softmax_with_entropy" + arguments + "(Tensor logp, Tensor entropy)").c_str(), tags);
  m.def(
      "_selective_log_softmax_forward(Tensor input, Tensor index, float temperature, float? softcap, bool entropy) -> "
      "(Tensor logp, Tensor entropy, Tensor stats)",
      tags);
  m.def(
      "_selective_log_softmax_backward(Tensor? grad_logp, Tensor? grad_entropy, Tensor input, Tensor index, Tensor "
      "stats, float temperature, float? softcap) -> Tensor",
      tags);
}

#define TSE_REGISTER(key, suffix)                                                                  \
  TORCH_LIBRARY_IMPL(torch_softmax_ext, key, m) {                                                  \
    m.impl("selective_log_softmax", selective_log_softmax<selective_log_softmax_forward##suffix>); \
    m.impl("selective_log_softmax_with_entropy",                                                   \
           selective_log_softmax_with_entropy<selective_log_softmax_forward##suffix>);             \
    m.impl("_selective_log_softmax_forward", selective_log_softmax_forward##suffix);               \
    m.impl("_selective_log_softmax_backward", selective_log_softmax_backward##suffix);             \
  }
TSE_REGISTER(CPU, )
TSE_REGISTER(CUDA, )
TSE_REGISTER(Meta, _meta)

}  // namespace tse
