// Checks of softmax and log_softmax.
#include "kernels_maps.h"
#include "softmax/softmax.h"

namespace tse {
namespace {

const Check kCheck = [](bool is_small) {
  check_map_everywhere(TSE_MAP(softmax, 1, false, launch_softmax_fwd), is_small);
  check_map_everywhere(TSE_MAP(log_softmax, 1, true, launch_log_softmax_fwd), is_small);
};

}  // namespace
}  // namespace tse
