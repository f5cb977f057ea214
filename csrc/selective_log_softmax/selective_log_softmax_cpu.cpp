#define TSE_ISA_BODY "selective_log_softmax/selective_log_softmax_cpu-inl.h"
#include "selective_log_softmax/selective_log_softmax.h"

#include "common/cpu/foreach_isa.h"

TSE_ROWS(selective_log_softmax_fwd_rows, SelectiveLogSoftmaxParams)
TSE_ROWS(selective_log_softmax_bwd_rows, SelectiveLogSoftmaxParams)
