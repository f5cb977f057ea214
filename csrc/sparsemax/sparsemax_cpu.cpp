#define TSE_ISA_BODY "sparsemax/sparsemax_cpu-inl.h"
#include "sparsemax/sparsemax.h"

#include "common/cpu/foreach_isa.h"

TSE_ROWS(sparsemax_fwd_rows, RowMapParams)
TSE_ROWS(sparsemax_bwd_rows, RowMapParams)
