// Checks of sparsemax.
#include "kernels_maps.h"
#include "sparsemax/sparsemax.h"

namespace tse {
namespace {

const Check kCheck = [](bool is_small) {
  check_map_everywhere(TSE_MAP(sparsemax, 2, false, launch_sparsemax_fwd), is_small);
};

}  // namespace
}  // namespace tse
