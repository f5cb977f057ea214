// Argument checks whose text names operator, argument, what was expected and what came. [torch]
// The exception classes are those of the torch function that the operator replaces.
#pragma once
#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <cmath>
#include <optional>
#include <string_view>

#include "common/types.h"

// TSE_CHECK(condition, "cross_entropy", "target", "expected …, got ", x) raises RuntimeError; the others what they say.
#define TSE_CHECK(cond, op, arg, ...) TORCH_CHECK(cond, op, ": ", arg, ": ", __VA_ARGS__)
#define TSE_CHECK_VALUE(cond, op, arg, ...) TORCH_CHECK_VALUE(cond, op, ": ", arg, ": ", __VA_ARGS__)
#define TSE_CHECK_INDEX(cond, op, arg, ...) TORCH_CHECK_INDEX(cond, op, ": ", arg, ": ", __VA_ARGS__)
#define TSE_CHECK_NOT_IMPLEMENTED(cond, op, arg, ...) \
  TORCH_CHECK_NOT_IMPLEMENTED(cond, op, ": ", arg, ": ", __VA_ARGS__)

namespace tse {

// float32, float64, float16 or bfloat16 (torch raises NotImplementedError for others), strided.
inline void check_floating(const char* op, const char* arg, const at::Tensor& t) {
  const auto type = t.scalar_type();
  TSE_CHECK_NOT_IMPLEMENTED(type == at::kFloat || type == at::kDouble || type == at::kHalf || type == at::kBFloat16, op,
                            arg, "expected float32, float64, float16 or bfloat16, got ", type);
  TSE_CHECK(t.layout() == at::kStrided, op, arg, "expected a strided tensor, got layout ", t.layout());
}

inline void check_same_device(const char* op, const char* arg, const at::Tensor& t, const at::Tensor& input) {
  TSE_CHECK(t.device() == input.device(), op, arg, "expected device ", input.device(), " as input, got ", t.device());
}

// Whether two shapes are the same; symbolic sizes are then taken to be.
inline bool same_sizes(c10::SymIntArrayRef a, c10::SymIntArrayRef b) {
  bool same = a.size() == b.size();
  for (size_t d = 0; same && d < a.size(); ++d) same = a[d].sym_eq(b[d]).expect_true(__FILE__, __LINE__);
  return same;
}

// What a private operator is handed beside the input, as its forward made it: dtype, size, and where it lies.
inline void check_handed(const char* op, const char* arg, const at::Tensor& t, const at::Tensor& input,
                         at::ScalarType type, c10::SymIntArrayRef sizes) {
  check_same_device(op, arg, t, input);
  TSE_CHECK(t.scalar_type() == type && t.layout() == at::kStrided, op, arg, "expected a strided tensor of ", type,
            ", got ", t.scalar_type(), " in layout ", t.layout());
  TSE_CHECK(same_sizes(t.sym_sizes(), sizes), op, arg, "expected shape ", sizes, ", got ", t.sym_sizes());
}

inline Reduction parse_reduction(const char* op, std::string_view name) {
  if (name == "mean") return Reduction::kMean;
  if (name == "sum") return Reduction::kSum;
  TSE_CHECK_VALUE(name == "none", op, "reduction", "expected 'none', 'mean' or 'sum', got '", name, "'");
  return Reduction::kNone;
}

// softcap and temperature of logits.
inline void check_transform(const char* op, const std::optional<double>& softcap, double temperature) {
  TSE_CHECK_VALUE(!softcap.has_value() || (*softcap > 0 && std::isfinite(*softcap)), op, "softcap",
                  "expected None or a positive number, got ", softcap.value_or(0));
  TSE_CHECK_VALUE(temperature > 0 && std::isfinite(temperature), op, "temperature", "expected a positive number, got ",
                  temperature);
}

}  // namespace tse
