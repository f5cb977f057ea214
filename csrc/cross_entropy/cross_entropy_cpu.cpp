#define TSE_ISA_BODY "cross_entropy/cross_entropy_cpu-inl.h"
#include "cross_entropy/cross_entropy.h"

#include "common/cpu/foreach_isa.h"

namespace tse {

void cross_entropy_rows(const CrossEntropyParams& p, bool forward, bool backward, int64_t begin, int64_t end) {
  TSE_CALL_ISA(cross_entropy_rows, p, forward, backward, begin, end);
}
void cross_entropy_block_sums(const CrossEntropyParams& p, int64_t row, int64_t begin, int64_t end, BlockSum* sums) {
  TSE_CALL_ISA(cross_entropy_block_sums, p, row, begin, end, sums);
}
void cross_entropy_finish_row(const CrossEntropyParams& p, int64_t row, const BlockSum* sums) {
  TSE_CALL_ISA(cross_entropy_finish_row, p, row, sums);
}
void cross_entropy_bwd_blocks(const CrossEntropyParams& p, int64_t row, int64_t begin, int64_t end) {
  TSE_CALL_ISA(cross_entropy_bwd_blocks, p, row, begin, end);
}

}  // namespace tse
