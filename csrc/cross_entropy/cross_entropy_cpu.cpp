#define TSE_ISA_BODY "cross_entropy/cross_entropy_cpu-inl.h"
#include "cross_entropy/cross_entropy.h"

#include "common/cpu/foreach_isa.h"

TSE_ROWS(cross_entropy_rows, CrossEntropyParams)
