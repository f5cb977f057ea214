// The guess: the grad_output that forward assumes when it writes the gradient with the loss, while the row is in cache.
// [torch]
//
// The grad_output of a mean or a sum is one number, mostly the same in each step: 1, 1 / steps of gradient
// accumulation, or a loss scale. So the last one is assumed to come again, if it came twice in a row (a loss divided by
// a varying count does not). Backward compares: after a right guess the gradient has the bits that backward would
// compute, after a wrong one it is thrown away. On CUDA the device guesses and compares: common/cuda/stream_state.cuh.
#pragma once
#include <ATen/core/Tensor.h>

#include <atomic>
#include <optional>

namespace tse {

class GradientGuess {
 public:
  std::optional<double> get() const {
    return repeated_.load(std::memory_order_relaxed) ? std::optional(last_.load(std::memory_order_relaxed))
                                                     : std::nullopt;
  }
  void observe(double grad_output) {
    repeated_.store(last_.exchange(grad_output, std::memory_order_relaxed) == grad_output, std::memory_order_relaxed);
  }

 private:
  std::atomic<double> last_ = 1;
  std::atomic<bool> repeated_ = true;
};

// The number in a plain CPU tensor. item() goes through the dispatcher, which is measurable in small calls.
inline double number_in(const at::Tensor& t) {
  if (t.is_neg()) return t.item<double>();
  return t.scalar_type() == at::kDouble ? *t.const_data_ptr<double>() : double(*t.const_data_ptr<float>());
}

}  // namespace tse
