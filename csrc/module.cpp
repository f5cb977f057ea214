// The library itself: what was built and which instruction-set level runs. No operator. [torch]
#include <torch/library.h>

#include "common/cpu/isa.h"
#include "common/device.h"

namespace tse {
namespace {

std::string cpu_isa() { return isa_name(active_isa()); }

}  // namespace

TORCH_LIBRARY(torch_softmax_ext, m) {
  m.def("_cpu_isa() -> str", cpu_isa);
  m.def("_has_cuda() -> bool", has_cuda);
}

}  // namespace tse
