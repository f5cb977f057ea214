#define TSE_ISA_BODY "selective_log_softmax/selective_log_softmax_cpu-inl.h"
#include "selective_log_softmax/selective_log_softmax.h"

#include "common/cpu/foreach_isa.h"

namespace tse {

void selective_log_softmax_fwd_rows(const SelectiveLogSoftmaxParams& p, int64_t begin, int64_t end) {
  TSE_CALL_ISA(selective_log_softmax_fwd_rows, p, begin, end);
}
void selective_log_softmax_bwd_rows(const SelectiveLogSoftmaxParams& p, int64_t begin, int64_t end) {
  TSE_CALL_ISA(selective_log_softmax_bwd_rows, p, begin, end);
}

}  // namespace tse
