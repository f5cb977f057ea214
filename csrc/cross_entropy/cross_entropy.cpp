// Host entries of cross-entropy: schema, checks, allocation, dispatch to CPU rows or CUDA launchers. [torch]
// They sit below autograd (cross_entropy_autograd.cpp), so inference mode has the same checks.
#include "cross_entropy/cross_entropy.h"

#include <ATen/MemoryOverlap.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/full.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <numeric>
#include <tuple>
#include <vector>

#include "common/host.h"
#include "cross_entropy/cross_entropy_host.h"

namespace tse {
constexpr const char* kOp = "cross_entropy";

// What can be said without reading memory; sizes may be symbolic.
void check_cross_entropy(const at::Tensor& input, const at::Tensor& target) {
  check_floating(kOp, "input", input);
  check_same_device(kOp, "target", target, input);
  const auto x = input.sym_sizes(), t = target.sym_sizes();
  TSE_CHECK(!x.empty(), kOp, "input", "expected (C), (N, C) or (N, C, d1, …, dk), got a scalar");
  TSE_CHECK_NOT_IMPLEMENTED(!target.is_floating_point(), kOp, "target",
                            "expected class indices; class probabilities are not supported yet, got ",
                            target.scalar_type());
  TSE_CHECK(target.scalar_type() == at::kLong || target.scalar_type() == at::kInt, kOp, "target",
            "expected int64 or int32 class indices, got ", target.scalar_type());
  if (x.size() == 1) {
    TSE_CHECK_VALUE(t.empty() || (t.size() == 1 && t[0].sym_eq(1).expect_true(__FILE__, __LINE__)), kOp, "target",
                    "expected one class index, shape () or (1), for input of shape (C), got shape ", t);
    return;
  }
  bool same = t.size() + 1 == x.size();
  if (same) {
    TSE_CHECK_VALUE(x[0].sym_eq(t[0]).expect_true(__FILE__, __LINE__), kOp, "target", "expected batch size ", x[0],
                    " as input of shape ", x, ", got shape ", t);
    for (size_t d = 2; d < x.size(); ++d) same = same && x[d].sym_eq(t[d - 1]).expect_true(__FILE__, __LINE__);
  }
  TSE_CHECK(same, kOp, "target", "expected the shape of input without its class dimension, input ", x, ", got ", t);
}

namespace {

// The dimension of the classes: 0 for (C), else 1.
int64_t class_dim(const at::Tensor& input) { return input.dim() == 1 ? 0 : 1; }

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

// Counts the targets that are not ignored. A target that is no class raises before anything is written.
template <class Index>
double count_targets(const Index* target, int64_t rows, int64_t classes, int64_t ignore_index) {
  std::atomic<bool> bad = false;
  const double counted = sum_by_chunks(rows, [&](int64_t begin, int64_t end) {
    int64_t count = 0, outside = 0;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t is_counted = target[i] != ignore_index;
      count += is_counted;
      outside += is_counted & int64_t(uint64_t(target[i]) >= uint64_t(classes));
    }
    if (outside != 0) bad = true;
    return double(count);
  });
  if (bad) {
    const Index* t =
        std::find_if(target, target + rows, [&](int64_t v) { return v != ignore_index && (v < 0 || v >= classes); });
    TSE_CHECK_INDEX(false, kOp, "target", "expected a class index in [0, ", classes, ") or ignore_index ", ignore_index,
                    ", got ", int64_t(*t), " at row ", t - target);
  }
  return counted;
}

double count_targets(const CrossEntropyParams& p) {
  return p.target_is_int32
             ? count_targets(static_cast<const int32_t*>(p.target), row_count(p.rows), p.rows.n, p.ignore_index)
             : count_targets(static_cast<const int64_t*>(p.target), row_count(p.rows), p.rows.n, p.ignore_index);
}

// Σ row_loss, and divided by the counted targets for the mean.
template <class A>
void reduce_loss(const CrossEntropyParams& p) {
  const A* row_loss = static_cast<const A*>(p.row_loss);
  const double sum = sum_by_chunks(row_count(p.rows), [&](int64_t begin, int64_t end) {
    double a = 0, b = 0, c = 0, d = 0;  // one sum would wait for each addition
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
  *static_cast<A*>(p.loss) = A(p.reduction == Reduction::kMean ? sum / *p.total_weight : sum);  // 0 / 0 is NaN
}

// Rows of the logits and of their gradient that can be walked alike: classes or rows are neighbours in memory in both.
// Copies only where the logits are not dense, and without a gradient in the same cases, so that the loss has the same
// bits with and without.
enum class Gradient { kNone, kNew, kInPlace };

struct Operands {
  RowTensor input, grad;
  at::Tensor grad_input;  // what the caller gets

  Operands(const at::Tensor& logits, Gradient gradient) : input(as_rows(logits, class_dim(logits))) {
    const bool columns = input.rows.stride_inner == 1 && input.tensor.is_non_overlapping_and_dense();
    if (input.rows.stride_n != 1 && !columns) input = as_rows(input.tensor.contiguous(), class_dim(logits));
    if (gradient == Gradient::kNone) return;
    if (gradient == Gradient::kInPlace) {
      grad_input = logits;
      grad = input;
      return;
    }
    grad_input = with_huge_pages(at::empty_like(logits));
    grad = as_rows(grad_input, class_dim(logits));
    const bool alike = input.rows.stride_n == 1 ? grad.rows.stride_n == 1 : grad.rows.stride_inner == 1;
    if (alike) return;
    if (input.rows.stride_n != 1) {
      grad = as_rows(at::empty_like(input.tensor), class_dim(logits));
    } else {  // the gradient is dense where the logits are expanded: classes innermost in it, too
      std::vector<int64_t> sizes = logits.sizes().vec();
      sizes.erase(sizes.begin() + class_dim(logits));
      sizes.push_back(input.rows.n);
      grad = as_rows(at::empty(sizes, logits.options()).movedim(-1, class_dim(logits)), class_dim(logits));
    }
  }

  // `stats` is backward's: the counted targets, then row_m and row_sum in the loss' dtype.
  CrossEntropyParams params(const at::Tensor& target, int64_t ignore_index, Reduction reduction,
                            const at::Tensor& stats) const {
    CrossEntropyParams p{};
    p.dtype = dtype_of(input.tensor);
    p.rows = input.rows;
    p.input = input.tensor.const_data_ptr();
    p.target = target.const_data_ptr();
    p.target_is_int32 = target.scalar_type() == at::kInt;
    p.ignore_index = ignore_index;
    p.reduction = reduction;
    p.total_weight = const_cast<double*>(stats.const_data_ptr<double>());
    p.row_m = p.total_weight + 1;
    p.row_sum = static_cast<char*>(p.row_m) + target.numel() * (p.dtype == DType::kFloat64 ? 8 : 4);
    if (grad.tensor.defined()) {
      p.grad_rows = grad.rows;
      p.grad_input = grad.tensor.mutable_data_ptr();
    }
    return p;
  }

  at::Tensor finished_grad() const {
    if (!grad.tensor.is_same(grad_input)) grad_input.copy_(grad.tensor);
    return grad_input;
  }
};

// Rows over threads; where rows are fewer than threads and wide, the blocks of each row over threads.
void run_cpu(const CrossEntropyParams& p, bool forward, bool backward) {
  const int64_t rows = row_count(p.rows), blocks = (p.rows.n + kCrossEntropyBlock - 1) / kCrossEntropyBlock;
  const bool contiguous = p.rows.stride_n == 1 && (!backward || p.grad_rows.stride_n == 1);
  constexpr int64_t kBlocksPerTask = kElementsPerTask / kCrossEntropyBlock;
  if (!contiguous || rows >= at::get_num_threads() || blocks < 2 * kBlocksPerTask) {
    return parallel_rows(p.rows, [&](int64_t begin, int64_t end) {
      if (forward && backward) cross_entropy_fwd_bwd_rows(p, begin, end);
      else if (forward) cross_entropy_fwd_rows(p, begin, end);
      else cross_entropy_bwd_rows(p, begin, end);
    });
  }
  std::vector<BlockSum> sums(blocks);
  for (int64_t row = 0; row < rows; ++row) {
    if (forward) {
      at::parallel_for(0, blocks, kBlocksPerTask,
                       [&](int64_t begin, int64_t end) { cross_entropy_block_sums(p, row, begin, end, sums.data()); });
      cross_entropy_finish_row(p, row, sums.data());
    }
    if (backward) {
      at::parallel_for(0, blocks, kBlocksPerTask,
                       [&](int64_t begin, int64_t end) { cross_entropy_bwd_blocks(p, row, begin, end); });
    }
  }
}

CrossEntropyResult run_forward(const at::Tensor& input, const at::Tensor& target, int64_t ignore_index,
                               std::string_view reduction_name, Gradient gradient = Gradient::kNone,
                               double grad_output = 0) {
  check_cross_entropy(input, target);
  const Reduction reduction = parse_reduction(kOp, reduction_name);
  const c10::OptionalDeviceGuard guard(input.device());
  const Operands operands(input, gradient);
  const at::Tensor t = target.contiguous();
  const int64_t count = t.numel();
  const auto loss_options = input.options().dtype(accumulate_type(input.scalar_type()));

  CrossEntropyResult r;
  r.stats = at::empty({1 + count * (loss_options.dtype() == at::kDouble ? 2 : 1)}, input.options().dtype(at::kDouble));
  const bool reduce = reduction != Reduction::kNone;
  r.loss = reduce ? at::empty({}, loss_options) : at::empty(target.sizes(), loss_options);
  const at::Tensor row_loss = reduce ? at::empty({count}, loss_options) : r.loss;

  CrossEntropyParams p = operands.params(t, ignore_index, reduction, r.stats);
  p.row_loss = row_loss.mutable_data_ptr();
  p.loss = reduce ? r.loss.mutable_data_ptr() : nullptr;
  if (use_cuda(input)) {
    at::Tensor factor;
    if constexpr (kHasCuda) launch_cross_entropy_fwd(p, current_stream(input));
    if (gradient != Gradient::kNone) {
      factor = at::full({}, grad_output, loss_options);
      p.grad_output = factor.const_data_ptr();
      if constexpr (kHasCuda) launch_cross_entropy_bwd(p, current_stream(input));
      r.grad_input = operands.finished_grad();
    }
    return r;
  }
  *p.total_weight = count_targets(p);
  const float factor32 = float(grad_output);
  p.grad_output = p.dtype == DType::kFloat64 ? static_cast<const void*>(&grad_output) : &factor32;
  run_cpu(p, /*forward=*/true, /*backward=*/gradient != Gradient::kNone);
  if (gradient != Gradient::kNone) r.grad_input = operands.finished_grad();
  if (reduce) {
    if (p.dtype == DType::kFloat64) reduce_loss<double>(p);
    else reduce_loss<float>(p);
  }
  return r;
}

std::tuple<at::Tensor, at::Tensor> cross_entropy_forward(const at::Tensor& input, const at::Tensor& target,
                                                         int64_t ignore_index, std::string_view reduction) {
  const CrossEntropyResult r = run_forward(input, target, ignore_index, reduction);
  return {r.loss, r.stats};
}

at::Tensor cross_entropy_backward(const at::Tensor& grad_output, const at::Tensor& input, const at::Tensor& target,
                                  const at::Tensor& stats, int64_t ignore_index, std::string_view reduction_name) {
  const Reduction reduction = parse_reduction(kOp, reduction_name);
  const c10::OptionalDeviceGuard guard(input.device());
  const Operands operands(input, Gradient::kNew);
  const at::Tensor t = target.contiguous();
  // A gradient that is one number expanded over the rows, as sum() sends it back, is read as that one number.
  const bool one_number =
      reduction != Reduction::kNone || std::all_of(grad_output.strides().begin(), grad_output.strides().end(),
                                                   [](int64_t stride) { return stride == 0; });
  const at::Tensor g = one_number ? grad_output : grad_output.contiguous();

  CrossEntropyParams p = operands.params(t, ignore_index, reduction, stats);
  p.grad_output = g.const_data_ptr();
  p.grad_output_stride = one_number ? 0 : 1;
  if (use_cuda(input)) {
    if constexpr (kHasCuda) launch_cross_entropy_bwd(p, current_stream(input));
  } else {
    run_cpu(p, /*forward=*/false, /*backward=*/true);
  }
  return operands.finished_grad();
}

at::Tensor cross_entropy(const at::Tensor& input, const at::Tensor& target, int64_t ignore_index,
                         std::string_view reduction) {
  return run_forward(input, target, ignore_index, reduction).loss;
}

// ---- shapes only: fake tensors, whose sizes may be symbolic -------------------------------------------------------

std::tuple<at::Tensor, at::Tensor> cross_entropy_forward_meta(const at::Tensor& input, const at::Tensor& target,
                                                              int64_t, std::string_view reduction) {
  check_cross_entropy(input, target);
  const auto options = input.options().dtype(accumulate_type(input.scalar_type()));
  const auto size = target.sym_numel() * (options.dtype() == at::kDouble ? 2 : 1) + 1;
  at::Tensor stats = at::empty_symint({size}, input.options().dtype(at::kDouble));
  if (parse_reduction(kOp, reduction) != Reduction::kNone) return {at::empty({}, options), stats};
  return {at::empty_symint(target.sym_sizes(), options), stats};
}

at::Tensor cross_entropy_backward_meta(const at::Tensor&, const at::Tensor& input, const at::Tensor&, const at::Tensor&,
                                       int64_t, std::string_view) {
  return at::empty_like(input);
}

at::Tensor cross_entropy_meta(const at::Tensor& input, const at::Tensor& target, int64_t ignore_index,
                              std::string_view reduction) {
  return std::get<0>(cross_entropy_forward_meta(input, target, ignore_index, reduction));
}

}  // namespace

CrossEntropyResult cross_entropy_forward_backward(const at::Tensor& input, const at::Tensor& target,
                                                  int64_t ignore_index, std::string_view reduction, double grad_output,
                                                  bool in_place) {
  if (in_place) at::assert_no_internal_overlap(input);
  return run_forward(input, target, ignore_index, reduction, in_place ? Gradient::kInPlace : Gradient::kNew,
                     grad_output);
}

TORCH_LIBRARY_FRAGMENT(torch_softmax_ext, m) {
  const std::vector<at::Tag> tags = {at::Tag::pt2_compliant_tag};
  m.def("cross_entropy(Tensor input, Tensor target, *, int ignore_index=-100, str reduction=\"mean\") -> Tensor", tags);
  m.def("_cross_entropy_inplace_backward(Tensor(a!) input, Tensor target, int ignore_index, str reduction) -> Tensor",
        tags);
  m.def(
      "_cross_entropy_forward(Tensor input, Tensor target, int ignore_index, str reduction) -> (Tensor loss, Tensor "
      "stats)",
      tags);
  m.def(
      "_cross_entropy_backward(Tensor grad_output, Tensor input, Tensor target, Tensor stats, int ignore_index, str "
      "reduction) -> Tensor",
      tags);
}

#define TSE_REGISTER(key, suffix)                                      \
  TORCH_LIBRARY_IMPL(torch_softmax_ext, key, m) {                      \
    m.impl("cross_entropy", cross_entropy##suffix);                    \
    m.impl("_cross_entropy_inplace_backward", cross_entropy##suffix);  \
    m.impl("_cross_entropy_forward", cross_entropy_forward##suffix);   \
    m.impl("_cross_entropy_backward", cross_entropy_backward##suffix); \
  }
TSE_REGISTER(CPU, )
TSE_REGISTER(CUDA, )
TSE_REGISTER(Meta, _meta)

}  // namespace tse
