// Takes the place of csrc/common/device.cpp: every call runs the CUDA kernels, on CPU tensors.
#include "common/device.h"

namespace tse {

bool has_cuda() { return true; }
bool use_cuda(const at::Tensor&) { return true; }
cudaStream_t current_stream(const at::Tensor&) { return nullptr; }

}  // namespace tse
