#define TSE_ISA_BODY "entmax/entmax_cpu-inl.h"
#include "entmax/entmax.h"

#include "common/cpu/foreach_isa.h"
#include "softmax/softmax.h"
#include "sparsemax/sparsemax.h"

TSE_ROWS(entmax15_fwd_rows, RowMapParams)
TSE_ROWS(entmax15_bwd_rows, RowMapParams)
TSE_ROWS(entmax_fwd_rows, RowMapParams)
TSE_ROWS(entmax_bwd_rows, RowMapParams)
TSE_ROWS(alpha_bwd_rows, RowMapParams)

namespace tse {
namespace {

typedef void RowFunction(const RowMapParams& p, int64_t begin, int64_t end);
RowFunction* rows_of(const RowNumbers& alpha, RowFunction* softmax, RowFunction* entmax15, RowFunction* sparsemax,
                     RowFunction* any) {
  if (alpha.each != nullptr) return any;
  return alpha.same == 1 ? softmax : alpha.same == 1.5 ? entmax15 : alpha.same == 2 ? sparsemax : any;
}

}  // namespace

void fwd_rows_of_alpha(const RowMapParams& p, int64_t begin, int64_t end) {
  rows_of(p.alpha, softmax_fwd_rows, entmax15_fwd_rows, sparsemax_fwd_rows, entmax_fwd_rows)(p, begin, end);
}
void bwd_rows_of_alpha(const RowMapParams& p, int64_t begin, int64_t end) {
  rows_of(p.alpha, softmax_bwd_rows, entmax15_bwd_rows, sparsemax_bwd_rows, entmax_bwd_rows)(p, begin, end);
}

}  // namespace tse
