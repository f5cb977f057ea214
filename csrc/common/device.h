// Whether a call runs on the CPU or by the library's CUDA kernels. [torch]
//
// device.cpp alone depends on how the library was built. The test suite links its own in place of it, which lets the
// CUDA kernels run on CPU tensors (tests/cuda_on_host).
#pragma once
#include <ATen/core/Tensor.h>

#include "common/types.h"

namespace tse {

bool has_cuda();  // whether the library has CUDA kernels
TSE_CUDA void cuda_kernels();  // does nothing; is there where the kernels are
bool use_cuda(const at::Tensor& t);  // throws where `t` is on a GPU and the library has no CUDA kernels
cudaStream_t current_stream(const at::Tensor& t);

}  // namespace tse
