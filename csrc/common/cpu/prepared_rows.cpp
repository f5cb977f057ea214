#define TSE_ISA_BODY "common/cpu/prepared_rows-inl.h"
#include "common/cpu/foreach_isa.h"

TSE_ROWS(prepared_fwd_rows, PreparedRowsParams)
TSE_ROWS(prepared_bwd_rows, PreparedRowsParams)
