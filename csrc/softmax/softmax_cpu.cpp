#define TSE_ISA_BODY "softmax/softmax_cpu-inl.h"
#include "softmax/softmax.h"

#include "common/cpu/foreach_isa.h"

TSE_ROWS(softmax_fwd_rows, RowMapParams)
TSE_ROWS(softmax_bwd_rows, RowMapParams)
TSE_ROWS(log_softmax_fwd_rows, RowMapParams)
TSE_ROWS(log_softmax_bwd_rows, RowMapParams)
