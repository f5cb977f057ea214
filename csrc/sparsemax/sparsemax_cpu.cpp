#define TSE_ISA_BODY "sparsemax/sparsemax_cpu-inl.h"
#include "sparsemax/sparsemax.h"

#include "common/cpu/foreach_isa.h"

namespace tse {

void sparsemax_fwd_rows(const RowMapParams& p, int64_t begin, int64_t end) {
  TSE_CALL_ISA(sparsemax_fwd_rows, p, begin, end);
}
void sparsemax_bwd_rows(const RowMapParams& p, int64_t begin, int64_t end) {
  TSE_CALL_ISA(sparsemax_bwd_rows, p, begin, end);
}

}  // namespace tse
