// In a library with CUDA kernels, and in no other. [CUDA]
#include "common/types.h"

namespace tse {
void cuda_kernels() {}
}  // namespace tse
