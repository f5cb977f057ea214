// What every row map takes beside its logits: dimension, temperature, mask and dtype; checks, and their compositions of
// torch's operators. [torch]
#pragma once
#include <ATen/ExpandUtils.h>
#include <ATen/TensorOperators.h>
#include <ATen/WrapDimUtils.h>
#include <ATen/ops/isfinite.h>
#include <ATen/ops/max.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>

#include <limits>
#include <optional>
#include <string>
#include <tuple>

#include "common/check.h"
#include "common/host.h"
#include "common/operator.h"
#include "common/row_params.h"

namespace tse {

struct RowMapOptions {  // in the order of the schema
  int64_t dim;
  OptionalTensor row_temperature, mask;  // a temperature of its own for each row replaces the number
  double temperature = 1;
  std::optional<at::ScalarType> dtype;
  // Of entmax alone.
  double alpha = 1.5;
  OptionalTensor row_alpha;

  auto fields() const { return std::tie(dim, row_temperature, mask, temperature, dtype); }
  static std::string schema() {
    return "int dim=-1, Tensor? row_temperature=None, Tensor? mask=None, float temperature=1.0, "
           "ScalarType? dtype=None";
  }
  // Whether the arithmetic is in double, whatever the dtypes.
  bool is_double() const { return false; }
  bool is_mixed() const { return false; }  // whether only some alphas are above 2
  bool prepares() const { return row_temperature.has_value() || mask.has_value() || temperature != 1; }
};

// Whether an alpha is above 2, where a rounding of the threshold can change a probability as its root of order
// alpha - 1. The tensor, which replaces the number, is read.
inline bool is_steep(double alpha, const OptionalTensor& row_alpha) {
  if (!row_alpha.has_value()) return alpha > 2;
  return row_alpha->numel() > 0 && row_alpha->max().item<double>() > 2;
}

// Whether some alphas are above 2 and others are not.
inline bool is_mixed(const OptionalTensor& row_alpha) {
  return row_alpha.has_value() && row_alpha->numel() > 1 && is_steep(0, row_alpha) &&
         !(row_alpha->min().item<double>() > 2);
}

// Of each row f(options), computed once for all alphas above 2, which take double, and once for the others. So the bits
// of a row do not depend on the alphas of other rows.
template <class Options, class F>
at::Tensor by_steepness(const Options& o, const F& f) {
  const at::Tensor &alpha = *o.row_alpha, is_above = alpha > 2;
  Options steep = o, flat = o;
  steep.row_alpha = alpha.masked_fill(is_above.logical_not(), 3);
  flat.row_alpha = alpha.masked_fill(is_above, 2);
  return at::where(is_above, f(steep), f(flat));
}

struct EntmaxOptions : RowMapOptions {
  auto fields() const { return std::tuple_cat(RowMapOptions::fields(), std::tie(alpha, row_alpha)); }
  static std::string schema() { return RowMapOptions::schema() + ", float alpha=1.5, Tensor? row_alpha=None"; }
  bool is_double() const { return is_steep(alpha, row_alpha); }
  bool is_mixed() const { return tse::is_mixed(row_alpha); }
};

// The options of the same map over logits that are prepared.
template <class Options>
Options without_preparation(Options o) {
  o.row_temperature = o.mask = std::nullopt;
  o.temperature = 1;
  o.dtype = std::nullopt;
  return o;
}

// ---- checks ---------------------------------------------------------------------------------------------------------

inline int64_t checked_dim(const char* op, const at::Tensor& input, int64_t dim) {
  const int64_t rank = input.dim(), low = rank == 0 ? -1 : -rank, high = rank == 0 ? 0 : rank - 1;
  TSE_CHECK_INDEX(dim >= low && dim <= high, op, "dim", "expected a dimension in [", low, ", ", high,
                  "] for input of shape ", input.sym_sizes(), ", got ", dim);
  return at::maybe_wrap_dim(dim, rank);
}

// `t` broadcasts to input's shape, where `dim` is 1 if it is not negative.
inline void check_broadcast(const char* op, const char* arg, const at::Tensor& t, const at::Tensor& input,
                            int64_t dim = -1) {
  bool fits = t.dim() <= input.dim();
  for (int64_t d = 0; fits && d < t.dim(); ++d) {
    const int64_t of_input = d + input.dim() - t.dim();
    fits = t.sym_size(d) == 1 || (of_input != dim && t.sym_size(d) == input.sym_size(of_input));
  }
  if (dim < 0) {
    TSE_CHECK(fits, op, arg, "expected a shape that broadcasts to input's ", input.sym_sizes(), ", got ",
              t.sym_sizes());
  } else {
    TSE_CHECK(fits, op, arg, "expected a number for each row: a shape that broadcasts to input's ", input.sym_sizes(),
              " and has size 1 along dim ", dim, ", got ", t.sym_sizes());
  }
}

inline void check_row_numbers(const char* op, const char* arg, const OptionalTensor& t, const at::Tensor& input,
                              int64_t dim) {
  if (!t.has_value()) return;
  check_floating(op, arg, *t);
  if (t->dim() > 0 || !t->is_cpu()) check_same_device(op, arg, *t, input);
  check_broadcast(op, arg, *t, input, dim);
}

inline void check_mask(const char* op, const at::Tensor& mask, const at::Tensor& input) {
  if (mask.scalar_type() != at::kBool) {
    TSE_CHECK(mask.is_floating_point(), op, "mask", "expected a boolean or floating-point mask, got ",
              mask.scalar_type());
    check_floating(op, "mask", mask);
  }
  TSE_CHECK(mask.layout() == at::kStrided, op, "mask", "expected a strided tensor, got layout ", mask.layout());
  check_same_device(op, "mask", mask, input);
  check_broadcast(op, "mask", mask, input);
}

// Integers become the dtype that is asked for, as in torch.softmax.
template <class Options>
bool is_converted(const at::Tensor& input, const Options& o) {
  return o.dtype.has_value() && at::isIntegralType(input.scalar_type(), /*includeBool=*/true);
}

// With dim >= 0.
template <class Options>
Options checked(const char* op, const at::Tensor& input, Options o) {
  check_floating(op, "input", input);
  o.dim = checked_dim(op, input, o.dim);
  TSE_CHECK_VALUE(o.temperature > 0 && std::isfinite(o.temperature), op, "temperature",
                  "expected a positive number, got ", o.temperature);
  TSE_CHECK_VALUE(o.alpha > 0 && std::isfinite(o.alpha), op, "alpha", "expected a positive number, got ", o.alpha);
  check_row_numbers(op, "temperature", o.row_temperature, input, o.dim);
  check_row_numbers(op, "alpha", o.row_alpha, input, o.dim);
  if (o.mask.has_value()) check_mask(op, *o.mask, input);
  if (o.dtype.has_value())
    TSE_CHECK_NOT_IMPLEMENTED(
        *o.dtype == at::kFloat || *o.dtype == at::kDouble || *o.dtype == at::kHalf || *o.dtype == at::kBFloat16, op,
        "dtype", "expected float32, float64, float16 or bfloat16, got ", *o.dtype);
  return o;
}

// ---- for kernels ----------------------------------------------------------------------------------------------------

// The type of the arithmetic between input and result of these types.
inline at::ScalarType arithmetic_type(at::ScalarType a, at::ScalarType b) {
  return a == at::kDouble || b == at::kDouble ? at::kDouble : at::kFloat;
}

// A tensor that is broadcast to `sizes`, as one index into it for each row along `dim`.
struct PerRowTensor {
  at::Tensor tensor;
  RowIndex at;
  int64_t stride_n = 1;

  PerRowTensor(const at::Tensor& t, at::IntArrayRef sizes, int64_t dim) : tensor(t.expand(sizes)) {
    if (!set_index(dim)) {
      tensor = tensor.contiguous();
      set_index(dim);
    }
    if (tensor.dim() > 0 && sizes[dim] > 1) stride_n = tensor.stride(dim);
  }

 private:
  bool set_index(int64_t dim) {
    at = {};
    for (int64_t d = 0; d < tensor.dim(); ++d) {
      const int64_t size = tensor.size(d), stride = tensor.stride(d);
      if (d == dim || size == 1) continue;
      if (at.dims > 0 && at.stride[at.dims - 1] == stride * size) {  // one dimension with the one before
        at.size[at.dims - 1] *= size;
        at.stride[at.dims - 1] = stride;
        continue;
      }
      if (at.dims == kMaxRowDims) return false;
      at.size[at.dims] = size;
      at.stride[at.dims++] = stride;
    }
    return true;
  }
};

// A number for each row of `input`.
struct NumbersOfRows {
  std::optional<PerRowTensor> holder;
  RowNumbers numbers;

  NumbersOfRows(double same, const OptionalTensor& each, const at::Tensor& input, int64_t dim) {
    numbers.same = same;
    if (!each.has_value()) return;
    if (each->dim() == 0 && each->is_cpu()) {  // a copy to the device would wait for it
      numbers.same = each->item<double>();
      return;
    }
    auto sizes = input.sizes().vec();
    if (!sizes.empty()) sizes[dim] = 1;
    holder.emplace(each->to(input.device(), at::kDouble), sizes, dim);
    numbers.each = holder->tensor.const_data_ptr<double>();
    numbers.at = holder->at;
  }
};

// ---- compositions ---------------------------------------------------------------------------------------------------

inline at::Tensor over_temperature(const at::Tensor& t, const RowMapOptions& o) {
  if (o.row_temperature.has_value()) return t / *o.row_temperature;
  return o.temperature == 1 ? t : t / o.temperature;
}

// Logits divided by the temperature and masked, relative to the largest if there is a temperature: what is finite stays
// finite.
inline at::Tensor prepared_logits(const at::Tensor& input, const RowMapOptions& o) {
  const double low = -std::numeric_limits<double>::infinity();
  const auto type = arithmetic_type(input.scalar_type(), o.dtype.value_or(input.scalar_type()));
  at::Tensor x = input.to(type);
  if (!o.prepares() || input.sym_numel() == 0) return x;
  const bool is_bool = o.mask.has_value() && o.mask->scalar_type() == at::kBool;
  at::Tensor kept = x != low;  // -inf is not divided: the gradient of the temperature would be NaN
  if (is_bool) kept = kept & *o.mask;
  if (o.row_temperature.has_value() || o.temperature != 1) {
    const at::Tensor max = x.detach().masked_fill(kept.logical_not(), low).amax(o.dim, /*keepdim=*/true);
    x = over_temperature(x.masked_fill(kept.logical_not(), 0) - max.masked_fill(max == low, 0), o).to(type);
  }
  x = x.masked_fill(kept.logical_not(), low);
  return o.mask.has_value() && !is_bool ? x + o.mask->to(type) : x;
}

// Of a temperature for each row, where `grad` is the gradient at the prepared logits.
inline at::Tensor temperature_gradient(const at::Tensor& grad, const at::Tensor& input, const RowMapOptions& o) {
  const at::Tensor& t = *o.row_temperature;
  if (grad.sym_numel() == 0) return at::zeros_symint(t.sym_sizes(), t.options());
  // The sum of `grad` over a row is 0: it does not matter what is subtracted from its logits. Those that are not finite
  // have a gradient of 0.
  const auto type = grad.scalar_type();
  const double low = -std::numeric_limits<double>::infinity();
  const at::Tensor x = input.to(type), unusable = at::isfinite(x.detach()).logical_not();
  const at::Tensor max = x.detach().masked_fill(unusable, low).amax(o.dim, /*keepdim=*/true);
  const double least = type == at::kDouble ? -std::numeric_limits<double>::max() : -std::numeric_limits<float>::max();
  const at::Tensor z = (x - max.masked_fill(max == low, 0)).masked_fill(unusable, 0).clamp_min(least), w = t.to(type);
  return at::sum_to(-(grad * z).sum(o.dim, /*keepdim=*/true) / w / w, t.sym_sizes()).to(t.scalar_type());
}

}  // namespace tse
