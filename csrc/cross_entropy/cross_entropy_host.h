// What autograd calls without the dispatcher, for plain tensors in eager mode. [torch]
#pragma once
#include <ATen/core/Tensor.h>

#include <string_view>

namespace tse {

// Raises what torch.nn.functional.cross_entropy would. Reads no memory; sizes may be symbolic.
void check_cross_entropy(const at::Tensor& input, const at::Tensor& target);

struct CrossEntropyResult {
  at::Tensor loss;
  at::Tensor stats;       // what backward needs of each row beside the logits
  at::Tensor grad_input;  // of cross_entropy_forward_backward
};

// Loss and gradient in one go, for an incoming gradient that is known beforehand (of every row for "none"); in_place:
// the gradient takes the memory of the logits.
CrossEntropyResult cross_entropy_forward_backward(const at::Tensor& input, const at::Tensor& target,
                                                  int64_t ignore_index, std::string_view reduction, double grad_output,
                                                  bool in_place);

}  // namespace tse
