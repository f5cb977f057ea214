// Device and stream of a call, for a build with or without CUDA kernels. [torch]
#include "common/device.h"

#include <c10/util/Exception.h>
#ifdef TSE_WITH_CUDA
#include <c10/cuda/CUDAStream.h>
#endif

namespace tse {

bool has_cuda() { return cuda_kernels != nullptr; }

bool use_cuda(const at::Tensor& t) {
  TORCH_CHECK(!t.is_cuda() || has_cuda(), "torch_softmax_ext: this build has no CUDA kernels, got a tensor on ",
              t.device(), "; rebuild it where nvcc matches the CUDA version of torch");
  return t.is_cuda();
}

#ifdef TSE_WITH_CUDA
cudaStream_t current_stream(const at::Tensor& t) { return c10::cuda::getCurrentCUDAStream(t.device().index()); }
#else
cudaStream_t current_stream(const at::Tensor&) { return nullptr; }
#endif

}  // namespace tse
