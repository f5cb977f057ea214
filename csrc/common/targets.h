// Targets of the losses of rows: their dtypes, their count, and sums over rows in a fixed order. [torch]
#pragma once
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <c10/core/ScalarType.h>
#include <c10/core/SymIntArrayRef.h>
#include <c10/util/DimVector.h>

#include <algorithm>
#include <atomic>
#include <numeric>
#include <optional>
#include <utility>
#include <vector>

#include "common/check.h"

namespace tse {

// The dimension of the classes: 0 for (C), else 1.
inline int64_t class_dim(const at::Tensor& input) { return input.dim() == 1 ? 0 : 1; }

// The shape of what there is one of for each row.
inline c10::SymDimVector row_sizes(const at::Tensor& input, const at::Tensor& target) {
  if (input.dim() == 1) return {};  // of a target of shape (1), too
  c10::SymDimVector sizes(target.sym_sizes().begin(), target.sym_sizes().end());
  if (target.is_floating_point()) sizes.erase(sizes.begin() + class_dim(input));
  return sizes;
}

// The dtype of a target that is not class probabilities.
inline void check_index_dtype(const char* op, const at::Tensor& target) {
  const auto type = target.scalar_type();
  TSE_CHECK(type == at::kLong || type == at::kInt || type == at::kByte, op, "target",
            "expected int64, int32 or uint8 class indices, got ", type);
}

// Class indices as the kernels read them: int32 or int64.
inline at::Tensor class_indices(const at::Tensor& target) {
  return target.scalar_type() == at::kByte ? target.to(at::kInt) : target;
}

inline void check_logits(const char* op, const at::Tensor& input, const at::Tensor& target) {
  check_floating(op, "input", input);
  check_same_device(op, "target", target, input);
  TSE_CHECK(input.dim() > 0, op, "input", "expected (C), (N, C) or (N, C, d1, …, dk), got a scalar");
}

// Raises what torch.nn.functional.cross_entropy would of a target for these logits. Reads no memory; sizes may be
// symbolic.
inline void check_targets(const char* op, const at::Tensor& input, const at::Tensor& target) {
  const auto x = input.sym_sizes(), t = target.sym_sizes();
  if (target.is_floating_point()) {
    check_floating(op, "target", target);
    TSE_CHECK(same_sizes(t, x), op, "target",
              "expected int64, int32 or uint8 class indices, or class probabilities of input's shape ", x, ", got ",
              target.scalar_type(), " of shape ", t);
    return;
  }
  check_index_dtype(op, target);
  if (x.size() == 1) {
    TSE_CHECK_VALUE(t.empty() || same_sizes(t, {c10::SymInt(1)}), op, "target",
                    "expected one class index, shape () or (1), for input of shape (C), got shape ", t);
    return;
  }
  const bool fits = t.size() + 1 == x.size();
  TSE_CHECK_VALUE(!fits || same_sizes(x.slice(0, 1), t.slice(0, 1)), op, "target", "expected batch size ", x[0],
                  " as input of shape ", x, ", got shape ", t);
  TSE_CHECK(fits && same_sizes(x.slice(2), t.slice(1)), op, "target",
            "expected the shape of input without its class dimension, input ", x, ", got ", t);
}

// Logits and class probabilities of two dtypes are computed in the wider one, as torch does.
inline bool needs_promotion(const at::Tensor& input, const at::Tensor& target) {
  return target.is_floating_point() && input.is_floating_point() && target.scalar_type() != input.scalar_type();
}
inline std::pair<at::Tensor, at::Tensor> promoted(const at::Tensor& input, const at::Tensor& target) {
  const auto type = c10::promoteTypes(input.scalar_type(), target.scalar_type());
  return {input.to(type), target.to(type)};
}

// Σ f(begin, end) over chunks of the rows, which run in parallel and are added in order: the same bits for any threads.
template <class F>
double sum_by_chunks(int64_t rows, const F& f) {
  constexpr int64_t kChunk = 8192;
  if (rows <= kChunk) return f(0, rows);
  std::vector<double> chunks((rows + kChunk - 1) / kChunk);
  at::parallel_for(0, int64_t(chunks.size()), 2, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) chunks[c] = f(c * kChunk, std::min((c + 1) * kChunk, rows));
  });
  return std::accumulate(chunks.begin(), chunks.end(), 0.0);
}

// Σ of the rows' losses. Four sums: one would wait for each addition.
template <class A>
double sum_of_rows(const A* row_loss, int64_t rows) {
  return sum_by_chunks(rows, [&](int64_t begin, int64_t end) {
    double a = 0, b = 0, c = 0, d = 0;
    int64_t i = begin;
    for (; i + 4 <= end; i += 4) {
      a += double(row_loss[i]);
      b += double(row_loss[i + 1]);
      c += double(row_loss[i + 2]);
      d += double(row_loss[i + 3]);
    }
    for (; i < end; ++i) a += double(row_loss[i]);
    return (a + b) + (c + d);
  });
}

// CPU: the number of indices, `per_row` of each row, that are not ignored. One that is no class raises.
template <class Index>
double count_classes(const char* op, const char* arg, const Index* index, int64_t count, int64_t classes,
                     std::optional<int64_t> ignore_index, int64_t per_row = 1) {
  const bool may_ignore = ignore_index.has_value();
  const int64_t ignored = ignore_index.value_or(0);
  std::atomic<bool> bad = false;
  const double counted = sum_by_chunks(count, [&](int64_t begin, int64_t end) {
    int64_t found = 0, outside = 0;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t is_counted = !may_ignore | (index[i] != ignored);
      found += is_counted;
      outside += is_counted & int64_t(uint64_t(index[i]) >= uint64_t(classes));
    }
    if (outside != 0) bad = true;
    return double(found);
  });
  if (bad) {
    const Index* i = std::find_if(index, index + count,
                                  [&](int64_t v) { return (v < 0 || v >= classes) && !(may_ignore && v == ignored); });
    TSE_CHECK_INDEX(false, op, arg, "expected a class index in [0, ", classes, ")",
                    may_ignore ? " or ignore_index " + std::to_string(ignored) : "", ", got ", int64_t(*i), " at row ",
                    (i - index) / per_row);
  }
  return counted;
}
// Of a contiguous tensor, int32 or int64.
inline double count_classes(const char* op, const char* arg, const at::Tensor& index, int64_t classes,
                            std::optional<int64_t> ignore_index, int64_t per_row = 1) {
  const int64_t count = index.numel();
  return index.scalar_type() == at::kInt
             ? count_classes(op, arg, index.const_data_ptr<int32_t>(), count, classes, ignore_index, per_row)
             : count_classes(op, arg, index.const_data_ptr<int64_t>(), count, classes, ignore_index, per_row);
}

}  // namespace tse
