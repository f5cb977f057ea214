// Checks of entmax15 and entmax.
#include "entmax/entmax.h"
#include "kernels_maps.h"

namespace tse {
namespace {

const Check kCheck = [](bool is_small) {
  check_map_everywhere(TSE_MAP(entmax15, 1.5, false, launch_entmax15_fwd), is_small);
  for (double alpha : {0.7, 1.0001, 1.3, 2.5})
    if (!is_small || alpha == 1.3) check_map_everywhere(TSE_MAP(entmax, alpha, false, nullptr), is_small);
};

}  // namespace
}  // namespace tse
