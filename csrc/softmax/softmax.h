// Softmax and log-softmax rows on the CPU, rows [begin, end). [plain]
#pragma once
#include "common/row_params.h"

namespace tse {

void softmax_fwd_rows(const RowMapParams& p, int64_t begin, int64_t end);
void softmax_bwd_rows(const RowMapParams& p, int64_t begin, int64_t end);
void log_softmax_fwd_rows(const RowMapParams& p, int64_t begin, int64_t end);
void log_softmax_bwd_rows(const RowMapParams& p, int64_t begin, int64_t end);

}  // namespace tse
