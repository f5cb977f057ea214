// Cross-entropy: its options, and what it demands of its arguments. [torch]
#include <ATen/TensorOperators.h>
#include <c10/core/ScalarType.h>

#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include "common/autograd.h"
#include "common/targets.h"
#include "cross_entropy/cross_entropy_host.h"

namespace tse {
namespace {
constexpr const char* kOp = "cross_entropy";
}

c10::IValue CrossEntropyOptions::saved() const {
  const auto code = static_cast<int64_t>(parse_reduction(kOp, reduction));
  const bool is_plain = label_smoothing == 0 && z_loss_weight == 0 && !softcap.has_value() && temperature == 1;
  if (is_plain) return std::make_tuple(ignore_index, code);  // in small calls a longer tuple is measurable
  // No list among them: compiled autograd hashes what is saved.
  return std::make_tuple(ignore_index, code, label_smoothing, z_loss_weight, softcap.value_or(0), temperature);
}

CrossEntropyOptions CrossEntropyOptions::from_saved(const c10::IValue& saved, const at::Tensor& weight) {
  constexpr std::string_view kReductions[] = {"none", "mean", "sum"};  // by their codes
  const auto tuple = saved.toTuple();
  const auto& o = tuple->elements();
  CrossEntropyOptions options;
  if (weight.defined()) options.weight = weight;
  options.ignore_index = o[0].toInt();
  options.reduction = kReductions[o[1].toInt()];
  if (o.size() == 2) return options;
  const std::vector<c10::IValue> all = o.vec();
  options.label_smoothing = all[2].toDouble();
  options.z_loss_weight = all[3].toDouble();
  if (const double softcap = all[4].toDouble(); softcap != 0) options.softcap = softcap;
  options.temperature = all[5].toDouble();
  return options;
}

void check_options(const char* op, const at::Tensor& input, const c10::SymInt& classes, const CrossEntropyOptions& o,
                   bool probabilities) {
  parse_reduction(op, o.reduction);
  // Torch's bounds; here nothing outside is let through, NaN neither.
  TSE_CHECK(o.label_smoothing >= 0 && o.label_smoothing <= 1, op, "label_smoothing",
            "expected a number between 0.0 and 1.0, got ", o.label_smoothing);
  TSE_CHECK_VALUE(std::isfinite(o.z_loss_weight), op, "z_loss_weight", "expected a finite number, got ",
                  o.z_loss_weight);
  check_transform(op, o.softcap, o.temperature);
  TSE_CHECK(!probabilities || o.ignore_index < 0, op, "ignore_index",
            "expected none (a negative number) with class probabilities as target, got ", o.ignore_index);
  if (!o.weight.has_value()) return;
  const at::Tensor& w = *o.weight;
  check_same_device(op, "weight", w, input);
  const bool integral = at::isIntegralType(w.scalar_type(), /*includeBool=*/true);
  TSE_CHECK(w.is_floating_point() || (probabilities && integral), op, "weight", "expected floating point, got ",
            w.scalar_type());
  TSE_CHECK(w.dim() == 1 && w.sym_size(0).sym_eq(classes).expect_true(__FILE__, __LINE__), op, "weight",
            "expected one weight for each of ", classes, " classes, got shape ", w.sym_sizes());
}

bool wants_weight_gradient(const char* op, const at::Tensor& target, const OptionalTensor& weight) {
  const bool wanted = weight.has_value() && gradient_path(*weight) != GradientPath::kNone;
  TSE_CHECK(!wanted || target.is_floating_point(), op, "weight",
            "expected no gradient to be asked for with class indices as target (torch has none for them, either), got "
            "a tensor that requires grad");
  return wanted;
}

void check_cross_entropy(const at::Tensor& input, const at::Tensor& target, const CrossEntropyOptions& options) {
  check_logits(kOp, input, target);
  check_options(kOp, input, input.sym_size(class_dim(input)), options, target.is_floating_point());
  check_targets(kOp, input, target);
}

void check_writable(const at::Tensor& input, const at::Tensor& target, const CrossEntropyOptions& options) {
  std::vector<std::pair<int64_t, int64_t>> dims;  // stride, size
  for (int64_t d = 0; d < input.dim(); ++d)
    if (input.size(d) > 1) dims.emplace_back(input.stride(d), input.size(d));
  std::sort(dims.begin(), dims.end());
  bool apart = true;  // each dimension steps over all that the ones inside it span
  int64_t span = 1;
  for (const auto& [stride, size] : dims) {
    apart = apart && stride >= span;
    span += stride * (size - 1);
  }
  TSE_CHECK(apart || input.numel() == 0, kOp, "inplace_backward",
            "expected logits whose elements do not share memory, got an expanded or overlapping tensor of shape ",
            input.sizes(), " and strides ", input.strides());
  const bool shared = input.is_alias_of(target) || (options.weight.has_value() && input.is_alias_of(*options.weight));
  TSE_CHECK(!shared, kOp, "inplace_backward", "expected logits in memory of their own, got a target or weight in it");
}

}  // namespace tse
