// Linear cross-entropy below autograd: chunks of rows go through torch's matrix product and the fused cross-entropy.
// [torch]
//
// The logits of one chunk exist at a time. Their gradient takes their memory, and is added to the gradients of input,
// weight and bias before the next chunk. All of it is ATen operators: one code for CPU and CUDA.
#include <ATen/TensorOperators.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/mv.h>
#include <ATen/ops/nonzero.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <tuple>

#include "common/host.h"
#include "common/targets.h"
#include "linear_cross_entropy/linear_cross_entropy_host.h"

namespace tse {
constexpr const char* kOp = "linear_cross_entropy";

void check_linear_cross_entropy(const at::Tensor& input, const at::Tensor& linear_weight, const at::Tensor& target,
                                const LinearCrossEntropyOptions& options) {
  check_floating(kOp, "input", input);
  const auto x = input.sym_sizes(), t = target.sym_sizes();
  TSE_CHECK(!x.empty(), kOp, "input", "expected (…, H), got a scalar");
  TSE_CHECK(linear_weight.dim() == 2, kOp, "linear_weight", "expected shape (C, H), got ", linear_weight.sym_sizes());
  const c10::SymInt weight_sizes[] = {linear_weight.sym_size(0), x.back()}, &classes = weight_sizes[0];
  check_handed(kOp, "linear_weight", linear_weight, input, input.scalar_type(), weight_sizes);
  if (options.bias.has_value())
    check_handed(kOp, "linear_bias", *options.bias, input, input.scalar_type(), {&classes, 1});
  check_same_device(kOp, "target", target, input);
  const auto rows = x.slice(0, x.size() - 1);
  const bool probabilities = target.is_floating_point();
  if (probabilities) {
    check_floating(kOp, "target", target);
    c10::SymDimVector sizes(rows.begin(), rows.end());
    sizes.push_back(classes);
    TSE_CHECK(same_sizes(t, sizes), kOp, "target", "expected class indices, or class probabilities (…, ", classes,
              ") for input of shape ", x, ", got ", target.scalar_type(), " of shape ", t);
  } else {
    check_index_dtype(kOp, target);
    TSE_CHECK_VALUE(same_sizes(t, rows), kOp, "target",
                    "expected the shape of input without its last dimension, input ", x, ", got ", t);
  }
  TSE_CHECK_VALUE(!options.chunk_size.has_value() || options.chunk_size->sym_gt(0).expect_true(__FILE__, __LINE__), kOp,
                  "chunk_size", "expected None or a positive number of rows, got ", *options.chunk_size);

  check_options(kOp, input, classes, options.loss, probabilities);
}

namespace {

// A ninth of the rows: with what else a chunk needs, an eighth of the logits' memory where rows are many. Each chunk
// reads and writes the sum of grad_weight once: below 256 rows this is measurable beside its matrix products, from 1024
// on it is not.
int64_t default_chunk_size(int64_t rows) { return std::clamp<int64_t>((rows + 8) / 9, 256, 1024); }

// Logits and class probabilities of two dtypes meet in the wider one, as in cross_entropy.
at::ScalarType loss_type(const at::Tensor& input, const at::Tensor& target) {
  const auto type = input.scalar_type();
  return accumulate_type(target.is_floating_point() ? c10::promoteTypes(type, target.scalar_type()) : type);
}

// The gradients of float16 tensors leave in float32: they would underflow before the loss scale arrives in backward.
at::ScalarType gradient_type(at::ScalarType type) { return type == at::kHalf ? at::kFloat : type; }

// The rows that count, and what the sums over all of them are divided by.
struct CountedRows {
  at::Tensor target;  // theirs; class probabilities all count
  at::Tensor index;  // where they are; undefined where all count
  int64_t count;
  double total_weight;

  CountedRows(const at::Tensor& target_, int64_t classes, const CrossEntropyOptions& options) {
    if (target_.is_floating_point()) {
      target = target_.dim() == 1 ? target_.unsqueeze(0) : target_.flatten(0, -2);
      count = target.size(0);
      total_weight = double(count);
      return;
    }
    target = class_indices(target_).reshape({-1});
    const at::Tensor host = target.cpu().contiguous();  // one wait for the device
    total_weight = count_classes(kOp, "target", host, classes, options.ignore_index);
    count = int64_t(total_weight);
    if (count < target.size(0)) {
      index = at::nonzero(host != options.ignore_index).squeeze(1).to(target.device());
      target = target.index_select(0, index);
    }
    if (options.weight.has_value())
      total_weight = options.weight->index_select(0, target).sum(at::kDouble).item<double>();
  }
};

// Copies of weights in another dtype are made of so many classes at a time.
template <class F>
void by_classes(int64_t classes, const F& f) {
  constexpr int64_t kClasses = 4096;
  for (int64_t c = 0; c < classes; c += kClasses) f(c, std::min(kClasses, classes - c));
}

// The gradients, added up chunk by chunk; those of half types in float32. The products of float16 are in float32, too,
// whose range gradients need.
class Gradients {
 public:
  at::Tensor input, weight, bias;

  Gradients(const at::Tensor& x, const at::Tensor& linear_weight, const CountedRows& counted, Wanted wanted)
      : x_(x), w_(linear_weight), counted_(counted), wanted_(wanted) {
    const auto type = x.scalar_type(), sum_type = accumulate_type(type);
    // No row counts: zeros, as there are no chunks. Else the first chunk writes.
    const auto fresh = [&](at::IntArrayRef sizes, at::ScalarType t, bool zero) {
      const auto options = x.options().dtype(t);
      return with_huge_pages(zero ? at::zeros(sizes, options) : at::empty(sizes, options));
    };
    const int64_t classes = w_.size(0), features = w_.size(1);
    if (wanted.input) input = fresh({x.size(0), features}, gradient_type(type), counted.index.defined());
    if (wanted.weight) weight = fresh({classes, features}, sum_type, counted.count == 0);
    if (wanted.bias) bias = fresh({classes}, sum_type, true);
  }

  // g: of the chunk's logits; rows: the chunk's input; factors: grad_output of each row, or undefined.
  void add(int64_t begin, const at::Tensor& g, const at::Tensor& rows, const at::Tensor& factors) {
    const bool is_half = x_.scalar_type() == at::kHalf, is_first = begin == 0;
    const at::Tensor column = factors.defined() ? factors.unsqueeze(1) : at::Tensor();
    if (wanted_.input) {
      const bool in_place = !counted_.index.defined();
      at::Tensor out =
          in_place ? input.narrow(0, begin, g.size(0)) : at::empty({g.size(0), w_.size(1)}, input.options());
      if (is_half) {
        by_classes(w_.size(0), [&](int64_t c, int64_t n) {
          const at::Tensor w = w_.narrow(0, c, n).to(at::kFloat), part = g.narrow(1, c, n);
          if (c == 0) at::mm_out(out, part, w);
          else out.addmm_(part, w);
        });
      } else {
        at::mm_out(out, g, w_);
      }
      if (column.defined()) out.mul_(column);
      if (!in_place) input.index_copy_(0, counted_.index.narrow(0, begin, g.size(0)), out);
    }
    if (wanted_.weight) {
      const at::Tensor scaled = column.defined() ? rows * column : rows;
      if (weight.scalar_type() == g.scalar_type()) {
        if (is_first) at::mm_out(weight, g.t(), scaled);
        else weight.addmm_(g.t(), scaled);
      } else {
        by_classes(w_.size(0), [&](int64_t c, int64_t n) {
          const at::Tensor part = at::mm(g.narrow(1, c, n).t(), scaled);
          at::Tensor sum = weight.narrow(0, c, n);
          if (is_first) sum.copy_(part);
          else sum.add_(part);
        });
      }
    }
    if (wanted_.bias) bias.add_(factors.defined() ? at::mv(g.t(), factors) : g.sum(0, false, bias.scalar_type()));
  }

 private:
  const at::Tensor x_, w_;
  const CountedRows& counted_;
  const Wanted wanted_;
};

// out = rows · linear_weightᵀ + bias, in the dtype of rows.
void multiply(const at::Tensor& out, const at::Tensor& rows, const at::Tensor& linear_weight,
              const OptionalTensor& bias) {
  const auto type = rows.scalar_type();
  const auto columns = [&](int64_t c, int64_t n) {
    at::Tensor part = out.narrow(1, c, n);
    const at::Tensor w = linear_weight.narrow(0, c, n).t().to(type);
    if (bias.has_value()) at::addmm_out(part, bias->narrow(0, c, n).to(type), rows, w);
    else at::mm_out(part, rows, w);
  };
  if (type == linear_weight.scalar_type()) columns(0, linear_weight.size(0));
  else by_classes(linear_weight.size(0), columns);
}

LossAndGradients shapes(const at::Tensor& input, const at::Tensor& linear_weight, const at::Tensor& target,
                        const LinearCrossEntropyOptions& options, Wanted wanted) {
  const auto loss_options = input.options().dtype(loss_type(input, target));
  const auto gradient = [&](bool is_wanted, c10::SymIntArrayRef sizes) {
    return is_wanted ? at::empty_symint(sizes, input.options().dtype(gradient_type(input.scalar_type())))
                     : at::empty({0}, input.options());
  };
  const auto row_sizes = input.sym_sizes().slice(0, input.dim() - 1);
  return {options.loss.reduction == "none" ? at::empty_symint(row_sizes, loss_options) : at::empty({}, loss_options),
          gradient(wanted.input, input.sym_sizes()), gradient(wanted.weight, linear_weight.sym_sizes()),
          gradient(wanted.bias, linear_weight.sym_sizes().slice(0, 1))};
}

// grad_output: of each row, for reduction "none"; undefined: 1.
LossAndGradients run(const at::Tensor& input, const at::Tensor& linear_weight, const at::Tensor& target,
                     const LinearCrossEntropyOptions& options, Wanted wanted, const at::Tensor& grad_output = {}) {
  check_linear_cross_entropy(input, linear_weight, target, options);
  if (input.is_meta()) return shapes(input, linear_weight, target, options, wanted);
  const c10::OptionalDeviceGuard guard(input.device());
  const auto row_sizes = input.sizes().slice(0, input.dim() - 1);
  const int64_t classes = linear_weight.size(0), rows = c10::multiply_integers(row_sizes);
  const at::Tensor x = input.reshape({rows, input.size(-1)});
  const CountedRows counted(target, classes, options.loss);
  const bool by_rows = options.loss.reduction == "none", mean = options.loss.reduction == "mean";
  const auto loss_options = input.options().dtype(loss_type(input, target));
  const auto type = gradient_type(input.scalar_type());  // of the logits
  const auto wider = target.is_floating_point() ? c10::promoteTypes(type, target.scalar_type()) : type;

  CrossEntropyOptions o = options.loss;
  if (o.weight.has_value()) o.weight = o.weight->to(loss_options.dtype());  // once, not per chunk
  o.reduction = by_rows ? "none" : "sum";
  // The z-loss has the count as its divisor: scaled so that it may be divided by the weights as the rest.
  if (mean && counted.count != 0) o.z_loss_weight *= counted.total_weight / double(counted.count);
  const double factor = mean ? 1 / counted.total_weight : 1;

  Gradients gradients(x, linear_weight, counted, wanted);
  at::Tensor loss = by_rows ? at::zeros({rows}, loss_options) : at::zeros({}, input.options().dtype(at::kDouble));
  at::Tensor factors = grad_output;
  if (factors.defined()) factors = factors.reshape({-1}).to(type);
  if (factors.defined() && counted.index.defined()) factors = factors.index_select(0, counted.index);
  const int64_t chunk_size = options.chunk_size.has_value() ? options.chunk_size->guard_int(__FILE__, __LINE__)
                                                            : default_chunk_size(counted.count);
  const int64_t chunk = std::min(chunk_size, counted.count);
  const at::Tensor buffer = with_huge_pages(at::empty({chunk, classes}, input.options().dtype(type)));

  for (int64_t begin = 0; begin < counted.count; begin += chunk) {
    const int64_t n = std::min(chunk, counted.count - begin);
    const auto part = [&](const at::Tensor& t) { return t.defined() ? t.narrow(0, begin, n) : t; };
    const at::Tensor index = part(counted.index);
    const at::Tensor chunk_rows = (index.defined() ? x.index_select(0, index) : part(x)).to(type);
    const at::Tensor logits = buffer.narrow(0, 0, n);
    multiply(logits, chunk_rows, linear_weight, options.bias);
    const at::Tensor z = logits.to(wider),
                     t = part(counted.target).to(target.is_floating_point() ? wider : counted.target.scalar_type());
    const at::Tensor chunk_loss = wanted.any() ? cross_entropy_forward_backward(z, t, o, factor, /*in_place=*/true).loss
                                               : Operator<cross_entropy>::call(z, t, o);
    if (!by_rows) loss.add_(chunk_loss);
    else if (index.defined()) loss.index_copy_(0, index, chunk_loss);
    else part(loss).copy_(chunk_loss);
    if (wanted.any()) gradients.add(begin, z.to(type), chunk_rows, part(factors));
  }
  if (mean) loss.div_(counted.total_weight);  // 0 / 0 is NaN
  loss = by_rows ? loss.reshape(row_sizes) : loss.to(loss_options.dtype());
  const auto finished = [&](const at::Tensor& sum, at::IntArrayRef sizes) {
    return sum.defined() ? sum.to(type).reshape(sizes) : at::empty({0}, input.options());
  };
  return {loss, finished(gradients.input, input.sizes()), finished(gradients.weight, linear_weight.sizes()),
          finished(gradients.bias, {classes})};
}

}  // namespace

LossAndGradients linear_cross_entropy_forward(const at::Tensor& input, const at::Tensor& linear_weight,
                                              const at::Tensor& target, const LinearGradientOptions& o) {
  return run(input, linear_weight, target, o.options, o.wanted);
}

ThreeGradients linear_cross_entropy_backward(const at::Tensor& grad_output, const at::Tensor& input,
                                             const at::Tensor& linear_weight, const at::Tensor& target,
                                             const LinearGradientOptions& o) {
  check_linear_cross_entropy(input, linear_weight, target, o.options);
  TSE_CHECK(o.options.loss.reduction == "none", kOp, "reduction", "expected 'none', got '", o.options.loss.reduction,
            "'");
  check_handed(kOp, "grad_output", grad_output, input, loss_type(input, target),
               input.sym_sizes().slice(0, input.dim() - 1));
  const auto [loss, of_input, of_weight, of_bias] = run(input, linear_weight, target, o.options, o.wanted, grad_output);
  return {of_input, of_weight, of_bias};
}

}  // namespace tse
