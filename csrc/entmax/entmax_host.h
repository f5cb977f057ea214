// The operator entmax, as the losses that are composed of it call it. [torch]
#pragma once
#include "common/operator.h"

namespace tse {

// Differentiable any number of times.
at::Tensor entmax_map(const at::Tensor& input, int64_t dim, double alpha, const OptionalTensor& row_alpha);

}  // namespace tse
