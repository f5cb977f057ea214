// What host entries and autograd of linear cross-entropy share. [torch]
#pragma once
#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>

#include "cross_entropy/cross_entropy_host.h"

namespace tse {

// The arguments of the schemas behind input, linear_weight and target.
#define TSE_LINEAR_OPTIONS                                                                                           \
  const OptionalTensor &linear_bias, const OptionalTensor &weight, int64_t ignore_index, std::string_view reduction, \
      double label_smoothing, double z_loss_weight, std::optional<double> softcap, double temperature,               \
      std::optional<c10::SymInt> chunk_size
#define TSE_LINEAR_PACKED                                                                                            \
  LinearCrossEntropyOptions {                                                                                        \
    {weight, ignore_index, reduction, label_smoothing, z_loss_weight, softcap, temperature}, linear_bias, chunk_size \
  }
#define TSE_LINEAR_UNPACKED(o)                                                                    \
  (o).bias, (o).loss.weight, (o).loss.ignore_index, (o).loss.reduction, (o).loss.label_smoothing, \
      (o).loss.z_loss_weight, (o).loss.softcap, (o).loss.temperature, (o).chunk_size

struct LinearCrossEntropyOptions {
  CrossEntropyOptions loss;
  OptionalTensor bias;
  std::optional<c10::SymInt> chunk_size;
};

// Reads no memory; sizes may be symbolic.
void check_linear_cross_entropy(const at::Tensor& input, const at::Tensor& linear_weight, const at::Tensor& target,
                                const LinearCrossEntropyOptions& options);

// The gradients that somebody asked for.
struct Wanted {
  bool input = false, weight = false, bias = false;
  bool any() const { return input || weight || bias; }
};

}  // namespace tse
