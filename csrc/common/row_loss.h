// The form of what reads rows and targets, f(input, target, options): how a call is differentiated. [torch]
//
// First derivatives come from the operator's kernels, others from a composition of torch's operators. RowResults is for
// several results; RowLoss for a loss alone: where grad_output is one number, its gradient is computed in forward for
// the grad_output that is guessed (gradient_guess.h), and handed out in backward where the guess was right. A loss is a
// struct:
//
//   struct Loss {
//     using Options;  // a struct of options with `reduction`, saved() and from_saved(saved, tensor)
//     // The kernels of the loss and of its forward, which returns loss and statistics, as operators.
//     using Op, Forward = Operator<…>;
//     // Loss, statistics and gradient in one go, for a guess; nullopt: the device's.
//     static Result forward_backward(input, target, options, std::optional<double> guess);
//     // CUDA: `written` is the gradient for the device's guess.
//     static at::Tensor backward(grad_output, input, target, stats, options, const at::Tensor& written);
//     static at::Tensor target_backward(grad_output, input, target, stats, options);
//     // The loss, and what else is differentiated of `count` results, of torch's operators; stats: of forward, or
//     // undefined.
//     static variable_list composed(input, target, options, size_t count, const at::Tensor& stats);
//     // Where options are differentiated, which only the composition can.
//     static bool needs_composition(target, options);
//   };
//   struct Results {  // with Options and composed as above
//     static constexpr size_t kSaved;  // input, target and what forward saves
//     static RowForward forward(input, target, options);
//     // The gradients of input and target where they are `wanted`. grad_outputs that are undefined are 0.
//     static variable_list backward(grad_outputs, saved, options, std::array<bool, 2> wanted);
//   };
#pragma once
#include <ATen/SavedTensorHooks.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <array>
#include <optional>
#include <string_view>
#include <type_traits>
#include <utility>

#include "common/autograd.h"
#include "common/gradient_guess.h"
#include "common/host.h"
#include "common/operator.h"
#include "common/targets.h"

namespace tse {

// Options with a tensor among them, which is saved beside the others, have it in tensor().
template <class Options, class = void>
constexpr bool kHasTensor = false;
template <class Options>
constexpr bool kHasTensor<Options, std::void_t<decltype(&Options::tensor)>> = true;

// What both share; Op is a Loss or Results.
template <class Op>
struct RowForm {
  using AutogradContext = torch::autograd::AutogradContext;
  using variable_list = torch::autograd::variable_list;
  using Options = typename Op::Options;

  // tensors: input, target, statistics, and what else backward needs.
  static void save(AutogradContext* ctx, const Options& options, variable_list tensors) {
    if constexpr (kHasTensor<Options>)
      if (options.tensor().has_value()) tensors.push_back(*options.tensor());
    ctx->save_for_backward(std::move(tensors));
    ctx->saved_data["options"] = options.saved();
  }
  // `count`: of the tensors that were saved.
  static Options saved_options(AutogradContext* ctx, const variable_list& saved, size_t count) {
    return Options::from_saved(ctx->saved_data["options"], saved.size() > count ? saved.back() : at::Tensor());
  }

  // The gradients of input and target, differentiable again.
  static variable_list composed_gradients(AutogradContext* ctx, const variable_list& saved, const Options& options,
                                          const variable_list& grad_outputs) {
    variable_list inputs(2);
    for (size_t i = 0; i < 2; ++i)
      if (ctx->needs_input_grad(i)) inputs[i] = saved[i];
    const auto outputs = Op::composed(saved[0], saved[1], options, grad_outputs.size(), saved[2]);
    return differentiable_gradients(outputs, grad_outputs, inputs);
  }
};

// `others` are no outputs of the autograd function: compiled autograd cannot mark them as without a gradient. `saved`:
// statistics, and what else backward needs beside input and target.
struct RowForward {
  torch::autograd::variable_list differentiable, others, saved;
};

template <class Results>
struct RowResults : RowForm<Results> {
  using typename RowForm<Results>::AutogradContext;
  using typename RowForm<Results>::variable_list;
  using typename RowForm<Results>::Options;

  struct Function : torch::autograd::Function<Function> {
    static constexpr bool is_traceable = true;

    static variable_list forward(AutogradContext* ctx, const at::Tensor& input, const at::Tensor& target,
                                 const Options& options, variable_list* others) {
      RowForward r = Results::forward(input, target, options);
      *others = std::move(r.others);
      r.saved.insert(r.saved.begin(), {input, target});
      RowResults::save(ctx, options, std::move(r.saved));
      ctx->set_materialize_grads(false);
      return r.differentiable;
    }

    static variable_list backward(AutogradContext* ctx, variable_list grad_outputs) {
      const auto saved = ctx->get_saved_variables();
      const Options options = RowResults::saved_options(ctx, saved, Results::kSaved);
      const auto is_defined = [](const at::Tensor& g) { return g.defined(); };
      const bool any = std::any_of(grad_outputs.begin(), grad_outputs.end(), is_defined);
      variable_list gradients;
      if (any && at::GradMode::is_enabled())  // somebody will differentiate these gradients
        gradients = RowResults::composed_gradients(ctx, saved, options, grad_outputs);
      else if (any)
        gradients =
            Results::backward(grad_outputs, saved, options, {ctx->needs_input_grad(0), ctx->needs_input_grad(1)});
      gradients.resize(4);
      return gradients;
    }
  };

  // The differentiable results, then the others.
  static variable_list apply(const at::Tensor& input, const at::Tensor& target, const Options& options) {
    variable_list others, results = Function::apply(input, target, options, &others);
    results.insert(results.end(), others.begin(), others.end());
    return results;
  }
};

template <class Loss>
struct RowLoss : RowForm<Loss> {
  using typename RowForm<Loss>::AutogradContext;
  using typename RowForm<Loss>::variable_list;
  using typename RowForm<Loss>::Options;

  static GradientGuess& guess_for(std::string_view reduction) {
    static GradientGuess mean, sum;
    return reduction == "mean" ? mean : sum;
  }

  struct Function : torch::autograd::Function<Function> {
    static constexpr bool is_traceable = true;

    static at::Tensor forward(AutogradContext* ctx, const at::Tensor& input, const at::Tensor& target,
                              const Options& options) {
      // Not under saved-tensor hooks: checkpointing would keep the gradient that it is there to drop.
      const bool hooks = !at::SavedTensorDefaultHooks::get_tls_state().stack.empty();
      const bool may_guess =
          options.reduction != "none" && input.requires_grad() && !hooks && all_plain(input, target, options);
      const bool on_device = may_guess && is_plain_cuda(input);  // the device guesses
      const auto guess = may_guess && !on_device ? guess_for(options.reduction).get() : std::nullopt;
      if (on_device || guess.has_value()) {
        const at::AutoDispatchBelowADInplaceOrView below_autograd;
        const auto r = Loss::forward_backward(input, target, options, guess);
        RowLoss::save(ctx, options, {input, target, r.stats});
        if (guess.has_value()) ctx->saved_data["guess"] = *guess;
        if (r.grad_input.defined()) ctx->saved_data["grad_input"] = r.grad_input;
        return r.loss;
      }
      auto [loss, stats] = Loss::Forward::call(input, target, options);
      RowLoss::save(ctx, options, {input, target, stats});
      return loss;
    }

    static variable_list backward(AutogradContext* ctx, variable_list grad_outputs) {
      const auto saved = ctx->get_saved_variables();
      const Options options = RowLoss::saved_options(ctx, saved, 3);
      const at::Tensor &g = grad_outputs[0], &input = saved[0], &target = saved[1], &stats = saved[2];
      variable_list gradients(3);
      if (at::GradMode::is_enabled()) {  // somebody will differentiate this gradient
        gradients = RowLoss::composed_gradients(ctx, saved, options, grad_outputs);
        gradients.resize(3);
        return gradients;
      }
      if (target.is_floating_point() && ctx->needs_input_grad(1))
        gradients[1] = Loss::target_backward(g, input, target, stats, options);
      const bool on_cpu = is_plain_cpu(input) && is_plain_cpu(g);
      const bool on_device = is_plain_cuda(input) && is_plain_cuda(g);
      const double number = on_cpu && options.reduction != "none" ? number_in(g) : 0;
      if (on_cpu && options.reduction != "none") guess_for(options.reduction).observe(number);
      at::Tensor written;
      const auto found = ctx->saved_data.find("grad_input");
      if ((on_cpu || on_device) && found != ctx->saved_data.end()) {
        written = found->second.toTensor();
        ctx->saved_data.erase(found);  // given away once: whoever gets it may change it
      }
      if (on_cpu && written.defined() && ctx->saved_data["guess"].toDouble() == number) gradients[0] = written;
      else if (ctx->needs_input_grad(0))
        gradients[0] = Loss::backward(g, input, target, stats, options, on_device ? written : at::Tensor());
      return gradients;
    }
  };

  static GradientPath path(const at::Tensor& input, const at::Tensor& target, const Options& options) {
    if (Loss::needs_composition(target, options)) return GradientPath::kComposed;
    const GradientPath of_input = gradient_path(input);
    if (!target.is_floating_point()) return of_input;
    const GradientPath of_target = gradient_path(target);
    return of_target == GradientPath::kComposed || of_input == GradientPath::kNone ? of_target : of_input;
  }

  static at::Tensor autograd(const at::Tensor& input, const at::Tensor& target, const Options& options) {
    if (needs_promotion(input, target)) {
      const auto [x, t] = promoted(input, target);
      return autograd(x, t, options);
    }
    const GradientPath p = path(input, target, options);
    if (p == GradientPath::kFused) return Function::apply(input, target, options);
    if (p == GradientPath::kComposed) return Loss::composed(input, target, options, /*count=*/1, /*stats=*/{})[0];
    return Loss::Op::call(input, target, options);
  }
};

}  // namespace tse
