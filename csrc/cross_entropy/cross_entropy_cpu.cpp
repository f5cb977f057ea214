#define TSE_ISA_BODY "cross_entropy/cross_entropy_cpu-inl.h"
#include "cross_entropy/cross_entropy.h"

#include "common/cpu/foreach_isa.h"

namespace tse {

void cross_entropy_rows(const CrossEntropyParams& p, bool forward, bool backward, int64_t begin, int64_t end) {
  TSE_CALL_ISA(cross_entropy_rows, p, forward, backward, begin, end);
}

}  // namespace tse
