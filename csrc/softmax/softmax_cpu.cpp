#define TSE_ISA_BODY "softmax/softmax_cpu-inl.h"
#include "softmax/softmax.h"

#include "common/cpu/foreach_isa.h"

namespace tse {

void softmax_fwd_rows(const RowMapParams& p, int64_t begin, int64_t end) {
  TSE_CALL_ISA(softmax_fwd_rows, p, begin, end);
}
void softmax_bwd_rows(const RowMapParams& p, int64_t begin, int64_t end) {
  TSE_CALL_ISA(softmax_bwd_rows, p, begin, end);
}

}  // namespace tse
