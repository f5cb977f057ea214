// The form of the row maps, which make of each row of `input` along `dim` a row of the same length: what they share.
// [torch]
//
// A map is a struct with its name, its kernels and two compositions of torch's operators; define_row_map<Map>(m)
// defines <name>(Tensor input, <options>) and _<name>_backward(Tensor grad_output, Tensor output, <options>). The
// gradient is computed from the output, which is all that is kept for it. Temperature, mask and dtype are the form's:
// maps see logits that are prepared (prepared_rows-inl.h).
//
//   struct Map {
//     using Options = RowMapOptions;  // or EntmaxOptions
//     static constexpr const char* kName;
//     static constexpr ForwardKernels kForward;  // CUDA: without a kernel for stored rows all are prepared
//     static constexpr RowMapKernels kBackward;
//     static constexpr bool kWidensHalf;  // the CPU's kernels are for float32 and float64 alone
//     static constexpr double kMasked;  // what a row of -inf alone becomes
//     // The map of prepared logits, differentiable any number of times; for torch.func and forward-mode AD.
//     static at::Tensor composed(const at::Tensor& logits, const Options& o);
//     // The gradient, differentiable any number of times in what is handed to it; for double backward.
//     static at::Tensor composed_backward(const at::Tensor& grad_output, const at::Tensor& output, const Options& o);
//   };
#pragma once
#include <ATen/ops/empty_like.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <string>

#include "common/autograd.h"
#include "common/host.h"
#include "common/operator.h"
#include "common/python.h"
#include "common/row_map_options.h"

namespace tse {

using RowMapKernels = Kernels<RowMapParams>;
struct ForwardKernels : RowMapKernels {
  void (*prepared_cuda)(const PreparedRowsParams& p, cudaStream_t stream);
};

// s · (g - Σ s g / Σ s), the gradient of every map but log-softmax; s: p^(2 - alpha) on the support. Outside g does not
// matter, even if it is infinite. g is taken relative to that of the largest s, which may be nearly the mean.
inline at::Tensor projected(const at::Tensor& grad_output, const at::Tensor& s, int64_t dim) {
  const at::Tensor inside = grad_output.masked_fill(s == 0, 0), sum = s.sum(dim, /*keepdim=*/true);
  const at::Tensor g = inside - inside.gather(dim, s.argmax(dim, /*keepdim=*/true));
  return s * (g - (s * g).sum(dim, /*keepdim=*/true) / sum.masked_fill(sum == 0, 1));
}

template <class Map>
struct RowMap {
  using Options = typename Map::Options;

  // The composition of the whole map. A row of -inf alone becomes kMasked.
  static at::Tensor composed(const at::Tensor& input, const Options& o) {
    if (input.sym_numel() == 0) return input.to(o.dtype.value_or(input.scalar_type())).clone();
    const at::Tensor logits = prepared_logits(input, o);
    const at::Tensor masked = (logits == -std::numeric_limits<double>::infinity()).all(o.dim, /*keepdim=*/true);
    const at::Tensor y = Map::composed(logits.masked_fill(masked, 0), without_preparation(o));
    return y.masked_fill(masked, Map::kMasked).to(o.dtype.value_or(input.scalar_type()));
  }

  // Whether the CPU's kernels, which have no half types, see these as float32.
  static bool is_widened(const at::Tensor& t) { return Map::kWidensHalf && t.element_size() == 2 && !use_cuda(t); }

  static at::Tensor forward(const at::Tensor& input, const Options& options) {
    if (is_converted(input, options)) return forward(input.to(*options.dtype), options);
    const Options o = checked(Map::kName, input, options);
    const auto type = o.dtype.value_or(input.scalar_type());
    const c10::OptionalDeviceGuard guard(input.device());
    const at::Tensor output = with_huge_pages(at::empty_like(input, input.options().dtype(type)));
    if (input.is_meta() || input.numel() == 0) return output;
    const bool on_cuda = use_cuda(input), is_double = !on_cuda && o.is_double();
    if (is_double && o.is_mixed())
      return output.copy_(by_steepness(o, [&](const Options& same) { return forward(input, same); }));
    const bool is_prepared = o.prepares() || type != input.scalar_type() || is_widened(input) || is_double ||
                             (on_cuda && Map::kForward.cuda == nullptr);
    const RowTensor x = as_rows(input, o.dim), y = as_rows(output, o.dim);
    const NumbersOfRows alpha(o.alpha, o.row_alpha, input, o.dim);
    RowMapParams p{};
    p.dtype = dtype_of(input);
    p.rows = x.rows;
    p.input = x.tensor.const_data_ptr();
    p.output_rows = y.rows;
    p.output = y.tensor.mutable_data_ptr();
    p.alpha = alpha.numbers;
    const bool contiguous = x.rows.stride_n == 1 && y.rows.stride_n == 1;
    if (is_prepared) {
      const NumbersOfRows temperature(o.temperature, o.row_temperature, input, o.dim);
      const auto arithmetic = is_double ? at::kDouble : arithmetic_type(input.scalar_type(), type);
      PreparedRowsParams q{};
      q.map = p;
      q.map.dtype = dtype_of(arithmetic);
      q.kernel = Map::kForward.cpu;
      q.input_dtype = p.dtype;
      q.output_dtype = dtype_of(type);
      q.temperature = temperature.numbers;
      std::optional<PerRowTensor> mask;
      if (o.mask.has_value()) {
        q.mask_is_bool = o.mask->scalar_type() == at::kBool;
        mask.emplace(q.mask_is_bool ? *o.mask : o.mask->to(arithmetic), input.sizes(), o.dim);
        q.mask = mask->tensor.const_data_ptr();
        q.mask_at = mask->at;
        q.mask_stride_n = mask->stride_n;
      }
      if (on_cuda) launch(Map::kName, Map::kForward.prepared_cuda, q, input);
      else parallel_rows(q, p.rows, contiguous, prepared_fwd_rows);
    } else {
      Map::kForward.run(Map::kName, p, p.rows, contiguous, input);
    }
    if (!y.tensor.is_same(output)) output.copy_(y.tensor);
    return output;
  }

  // o.dtype: of the result.
  static at::Tensor backward(const at::Tensor& grad_output, const at::Tensor& output, const Options& options) {
    const Options o = checked(Map::kName, output, options);
    check_handed(Map::kName, "grad_output", grad_output, output, output.scalar_type(), output.sym_sizes());
    const auto type = o.dtype.value_or(output.scalar_type());
    const c10::OptionalDeviceGuard guard(output.device());
    const bool on_cuda = use_cuda(output);
    if (on_cuda && type != output.scalar_type()) {
      const auto wider = arithmetic_type(output.scalar_type(), type);
      Options same = o;
      same.dtype = wider;
      return backward(grad_output.to(wider), output.to(wider), same).to(type);
    }
    const bool is_prepared = !on_cuda && (o.prepares() || type != output.scalar_type() || is_widened(output));
    const at::Tensor grad_input = with_huge_pages(at::empty_like(output, output.options().dtype(type)));
    if (output.is_meta() || output.numel() == 0) return grad_input;
    const RowTensor y = as_rows(output, o.dim), out = as_rows(grad_input, o.dim);
    RowTensor g = as_rows(grad_output, o.dim);
    // CUDA kernels read g by 16 bytes where they read the output so; an expanded g costs a copy.
    if (on_cuda && y.rows.stride_n == 1 && g.rows.stride_n != 1)
      g = as_rows(at::empty_like(output).copy_(grad_output), o.dim);
    const NumbersOfRows alpha(o.alpha, o.row_alpha, output, o.dim);
    RowMapParams p{};
    p.dtype = dtype_of(output);
    p.output_rows = y.rows;
    p.output = const_cast<void*>(y.tensor.const_data_ptr());
    p.grad_output_rows = g.rows;
    p.grad_output = g.tensor.const_data_ptr();
    p.grad_input_rows = out.rows;
    p.grad_input = out.tensor.mutable_data_ptr();
    p.alpha = alpha.numbers;
    const NumbersOfRows temperature(o.temperature, o.row_temperature, output, o.dim);
    p.temperature = temperature.numbers;
    const bool contiguous = y.rows.stride_n == 1 && g.rows.stride_n == 1 && out.rows.stride_n == 1;
    if (is_prepared) {
      PreparedRowsParams q{};
      q.map = p;
      q.map.dtype = dtype_of(arithmetic_type(output.scalar_type(), type));
      q.kernel = Map::kBackward.cpu;
      q.input_dtype = dtype_of(type);
      q.output_dtype = p.dtype;
      q.temperature = temperature.numbers;
      parallel_rows(q, p.output_rows, contiguous, prepared_bwd_rows);
    } else {
      Map::kBackward.run(Map::kName, p, p.output_rows, contiguous, output);
    }
    if (!out.tensor.is_same(grad_input)) grad_input.copy_(out.tensor);
    return grad_input;
  }

  struct Function : torch::autograd::Function<Function> {
    static constexpr bool is_traceable = true;

    // The tensors are those of the options once more: autograd looks for them among the arguments.
    static at::Tensor forward(torch::autograd::AutogradContext* ctx, const at::Tensor& input,
                              const OptionalTensor& row_temperature, const OptionalTensor& mask,
                              const OptionalTensor& row_alpha, const Options& o) {
      const at::Tensor output = Operator<RowMap::forward>::call(input, o);
      const bool is_masked = mask.has_value() && mask->requires_grad();
      const bool reads_input = row_temperature.has_value() && row_temperature->requires_grad();
      ctx->save_for_backward({output, reads_input ? input : at::Tensor(), row_temperature.value_or(at::Tensor()),
                              is_masked ? *mask : at::Tensor(), row_alpha.value_or(at::Tensor())});
      ctx->saved_data["options"] = std::make_tuple(o.dim, o.temperature, o.alpha, int64_t(input.scalar_type()));
      return output;
    }

    static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                   torch::autograd::variable_list grad_outputs) {
      const auto saved = ctx->get_saved_variables();
      const at::Tensor &output = saved[0], &input = saved[1], &mask = saved[3], &g = grad_outputs[0];
      const auto [dim, temperature, alpha, type] =
          ctx->saved_data["options"].to<std::tuple<int64_t, double, double, int64_t>>();
      Options o{};
      o.dim = dim;
      o.temperature = temperature;
      o.alpha = alpha;
      if (saved[2].defined()) o.row_temperature = saved[2];
      if (saved[4].defined()) o.row_alpha = saved[4];
      o.dtype = at::ScalarType(type);
      const bool of_alpha = saved[4].defined() && saved[4].requires_grad();
      torch::autograd::variable_list gradients(5);
      const bool is_double_backward = at::GradMode::is_enabled();
      if (!is_double_backward && !input.defined() && !mask.defined() && !of_alpha) {
        gradients[0] = Operator<RowMap::backward>::call(g, output, o);
        return gradients;
      }
      // At the logits that are prepared; what follows of it is of torch's operators.
      Options plain = without_preparation(o);
      plain.dtype = arithmetic_type(output.scalar_type(), *o.dtype);
      const at::Tensor grad = is_double_backward
                                  ? Map::composed_backward(g.to(*plain.dtype), output.to(*plain.dtype), plain)
                                  : Operator<RowMap::backward>::call(g, output, plain);
      gradients[0] = over_temperature(grad, o).to(*o.dtype);
      if (input.defined()) gradients[1] = temperature_gradient(grad, input, o);
      if (mask.defined()) gradients[2] = at::sum_to(grad, mask.sym_sizes()).to(mask.scalar_type());
      if constexpr (std::is_same_v<Options, EntmaxOptions>)
        if (of_alpha) gradients[3] = Map::alpha_gradient(g, output, o);
      return gradients;
    }
  };

  static at::Tensor autograd(const at::Tensor& input, const Options& o) {
    if (is_converted(input, o)) return autograd(input.to(*o.dtype), o);
    switch (gradient_path(input, o.row_temperature, o.mask, o.row_alpha)) {
      case GradientPath::kFused:
        return Function::apply(input, o.row_temperature, o.mask, o.row_alpha, o);
      case GradientPath::kComposed:
        return composed(input, checked(Map::kName, input, o));
      default:
        return Operator<forward>::call(input, o);
    }
  }
};

template <class Map>
void define_row_map(torch::Library& m) {
  using Form = RowMap<Map>;
  static const std::string backward = std::string("_") + Map::kName + "_backward";
  const std::string options = Map::Options::schema();
  define_public<Form::forward, Form::autograd>(m, Map::kName, "(Tensor input, " + options + ") -> Tensor");
  define<Form::backward>(m, backward.c_str(),
                         "(Tensor grad_output, Tensor output, " + without_defaults(options) + ") -> Tensor");
}

}  // namespace tse
