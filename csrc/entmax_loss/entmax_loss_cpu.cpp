#define TSE_ISA_BODY "entmax_loss/entmax_loss_cpu-inl.h"
#include "entmax_loss/entmax_loss.h"

#include "common/cpu/foreach_isa.h"

TSE_ROWS(entmax_loss_rows, EntmaxLossParams)
