// Checks of cross-entropy: loss, gradient and guess.
#include <algorithm>
#include <cmath>
#include <memory>
#include <random>
#include <vector>

#include "cross_entropy/cross_entropy.h"
#include "kernels_check.h"

namespace tse {
namespace {

struct Options {
  bool weight = false, probabilities = false, predictions = false, tied = false;
  double smoothing = 0, z = 0, softcap = 0, temperature = 1;
};

// Random logits, targets and grad_output, with memory for all results.
template <class T>
struct CrossEntropyCase {
  using A = Acc<T>;
  Matrix<T> x, g, q;
  std::vector<int64_t> target, predictions;
  std::vector<A> weight, row_loss, grad_output, row_m, row_sum, row_others, row_mass, grad_lse;
  std::unique_ptr<char[]> scratch;
  double total_weight[2] = {NAN, NAN}, guess = 0;
  A loss = NAN, z_loss = NAN;
  CrossEntropyParams p{};

  CrossEntropyCase(int64_t count, int64_t n, int64_t offset, bool columns, Reduction reduction, const Options& o)
      : x(count, n, offset, columns),
        g(count, n, offset, columns),
        q(count, n, offset, columns),
        target(count),
        predictions(count, -1),
        weight(n),
        row_loss(count, NAN),
        grad_output(reduction == Reduction::kNone ? count : 1),
        row_m(count, NAN),
        row_sum(count, NAN),
        row_others(count, NAN),
        row_mass(count, NAN),
        grad_lse(count) {
    std::mt19937 random(unsigned(n * 31 + count));
    std::normal_distribution<float> normal(0, 3);
    std::uniform_real_distribution<float> uniform(0.5f, 1.5f);
    for (A& w : weight) w = uniform(random);
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t c = 0; c < n; ++c) {
        x.at(i, c) = from_acc<T>(o.tied ? A(c % 3) * A(0.3) : A(normal(random)));
        q.at(i, c) = from_acc<T>(A(uniform(random) / n));
      }
      target[i] = i == 1 ? -100 : int64_t(random() % n);
    }
    for (A& v : grad_output) v = normal(random);
    for (A& v : grad_lse) v = normal(random);
    p.dtype = kDType<T>;
    p.rows = x.rows;
    p.input = x.data();
    if (o.probabilities) {
      p.probabilities = q.data();
      p.probabilities_rows = q.rows;
    } else {
      p.target = target.data();
    }
    p.ignore_index = -100;
    p.reduction = reduction;
    p.weight = o.weight ? weight.data() : nullptr;
    p.label_smoothing = o.smoothing;
    p.z_loss_weight = o.z;
    p.transform = {o.temperature, o.softcap};
    p.row_loss = row_loss.data();
    p.row_m = row_m.data();
    p.row_sum = row_sum.data();
    p.row_others = row_others.data();
    p.row_mass = o.smoothing != 0 || o.probabilities ? row_mass.data() : nullptr;
    p.predictions = o.predictions ? predictions.data() : nullptr;
    p.loss = reduction == Reduction::kNone ? nullptr : &loss;
    p.z_loss = reduction == Reduction::kNone ? nullptr : &z_loss;
    p.total_weight = total_weight;
    p.guess = &guess;
    p.grad_rows = g.rows;
    p.grad_input = g.data();
    p.grad_output = grad_output.data();
    p.grad_output_stride = reduction == Reduction::kNone;
    p.grad_lse = o.predictions ? grad_lse.data() : nullptr;
    scratch.reset(new char[cross_entropy_scratch(p)]);
    p.sums = reinterpret_cast<CrossEntropySums*>(scratch.get());
  }
};

template <class T>
void check_cross_entropy(int64_t count, int64_t n, int64_t offset, bool columns, Reduction reduction,
                         const Options& o = {}) {
  CrossEntropyCase<T> problem(count, n, offset, columns, reduction, o);
  auto& [x, g, q, target, predictions, weight, row_loss, grad_output, row_m, row_sum, row_others, row_mass, grad_lse,
         scratch, total_weight, guess, loss, z_loss, p] = problem;
  launch_cross_entropy_fwd(p, nullptr);
  if (reduction == Reduction::kNone) total_weight[0] = total_weight[1] = NAN;  // "none" has no divisor
  launch_cross_entropy_bwd(p, nullptr);

  const auto logit = [&](int64_t i, int64_t c) {
    const double v = double(to_acc(x.at(i, c)));
    return (o.softcap > 0 ? o.softcap * std::tanh(v / o.softcap) : v) / o.temperature;
  };
  const auto counts = [&](int64_t i) { return o.probabilities || target[i] >= 0; };
  const auto class_weight = [&](int64_t c) { return o.weight ? double(weight[c]) : 1.0; };
  double total = 0, total_z = 0, counted = 0, divisor = 0;
  for (int64_t i = 0; i < count; ++i) {
    counted += counts(i);
    divisor += counts(i) ? (o.probabilities ? 1 : class_weight(target[i])) : 0;
  }
  for (int64_t i = 0; i < count; ++i) {
    double max = -INFINITY, sum = 0, row = 0, mass = 0;
    for (int64_t c = 0; c < n; ++c) max = std::max(max, logit(i, c));
    for (int64_t c = 0; c < n; ++c) sum += std::exp(logit(i, c) - max);
    const double lse = max + std::log(sum);
    const auto t = [&](int64_t c) {
      const double own = o.probabilities ? double(to_acc(q.at(i, c))) : double(c == target[i]);
      return class_weight(c) * ((1 - o.smoothing) * own + o.smoothing / n);
    };
    for (int64_t c = 0; c < n && counts(i); ++c) {
      row += t(c) * (lse - logit(i, c));
      mass += t(c);
    }
    const double z = counts(i) ? o.z * lse * lse : 0;
    total += row;
    total_z += z;
    const double shown = reduction == Reduction::kNone ? row + z : row;
    expect(row_loss[i], shown, std::is_same_v<T, double> ? 1e-11 : 2e-5 * (1 + std::abs(shown)), "loss", i, 0);
    const double incoming = grad_output[reduction == Reduction::kNone ? i : 0];
    const double gt = reduction == Reduction::kMean ? incoming / divisor : incoming;
    const double gz = reduction == Reduction::kMean ? incoming / counted : incoming;
    const double gl = o.predictions ? double(grad_lse[i]) : 0;
    int64_t best = 0;
    for (int64_t c = 0; c < n; ++c) {
      if (double(to_acc(x.at(i, c))) > double(to_acc(x.at(i, best)))) best = c;
      const double probability = std::exp(logit(i, c) - lse), s = logit(i, c) * o.temperature / o.softcap;
      double want = probability * (mass * gt + 2 * o.z * lse * gz + gl) - t(c) * gt;
      want *= (o.softcap > 0 ? 1 - s * s : 1) / o.temperature;
      const double scale = (std::abs(gt) * (1 + mass) + std::abs(2 * o.z * lse * gz) + std::abs(gl)) / o.temperature;
      expect(to_acc(g.at(i, c)), counts(i) ? want : 0, 2 * kEps<T> * scale, "gradient", i, c);
    }
    if (o.predictions) expect(predictions[i], counts(i) ? best : -100, 0, "prediction", i, 0);
  }
  if (reduction == Reduction::kNone) return;
  const bool mean = reduction == Reduction::kMean;
  expect(loss, (mean ? total / divisor : total) + (mean ? total_z / counted : total_z), 2e-5 * (1 + total + total_z),
         "reduced", 0, 0);
  expect(z_loss, mean ? total_z / counted : total_z, 2e-5 * (1 + total_z), "z-loss", 0, 0);
}

// The gradient that forward writes has the bits of backward's, whatever was guessed.
template <class T>
void check_gradient_in_forward(int64_t count, int64_t n, int64_t offset, bool columns, Reduction reduction,
                               const Options& o = {}) {
  using A = Acc<T>;
  CrossEntropyCase<T> problem(count, n, offset, columns, reduction, o);
  CrossEntropyParams& p = problem.p;
  CrossEntropyState& state = *cross_entropy_state(nullptr);
  const A incoming = problem.grad_output[0], doubled = 2 * incoming;
  p.grad_output_stride = 0;
  const T garbage = from_acc<T>(A(123));
  const auto gradient = [&] {
    std::vector<double> values;
    for (int64_t i = 0; i < count; ++i)
      for (int64_t c = 0; c < n; ++c) values.push_back(to_acc(problem.g.at(i, c)));
    return values;
  };
  const auto forward = [&](Assumed what, double fixed = NAN) {
    p.assumed = what;
    p.fixed_grad_output = fixed;
    problem.loss = NAN;
    for (int64_t i = 0; i < count * n; ++i) problem.g.data()[i] = garbage;
    launch_cross_entropy_fwd(p, nullptr);
    expect(state.ticket, 0, 0, "ticket", 0, 0);
  };
  const auto backward = [&](A grad) {
    problem.grad_output[0] = grad;
    p.compare_guess = p.assumed == Assumed::kGuessed;
    launch_cross_entropy_bwd(p, nullptr);
    return gradient();
  };
  const auto expect_same = [&](const std::vector<double>& got, const std::vector<double>& want, const char* what) {
    for (int64_t i = 0; i < count * n; ++i) expect(got[i], want[i], 0, what, i / n, i % n);
  };

  state = {};
  forward(Assumed::kNone);
  const double loss = problem.loss;
  const std::vector<double> want = backward(incoming), want_doubled = backward(doubled);
  forward(Assumed::kFixed, double(incoming));
  expect_same(gradient(), want, "known gradient");
  expect(problem.loss, loss, 0, "loss with gradient", 0, 0);
  if (reduction == Reduction::kNone) return;

  for (int round = 0; round < 3; ++round) {
    forward(Assumed::kGuessed);
    expect(problem.guess, round < 2 ? NAN : double(incoming), 0, "guess", round, 0);
    if (round == 2) {
      expect_same(gradient(), want, "guessed gradient");
      problem.g.at(0, n - 1) = garbage;
    }
    const std::vector<double> got = backward(incoming);
    if (round < 2) expect_same(got, want, "gradient without a guess");
    else expect(got[n - 1], 123, 0, "a pass after a right guess", 0, n - 1);
    expect(problem.loss, loss, 0, "loss with guess", round, 0);
  }
  forward(Assumed::kGuessed);
  expect_same(backward(doubled), want_doubled, "gradient after a wrong guess");
  forward(Assumed::kGuessed);
  expect(problem.guess, NAN, 0, "guess after a change", 0, 0);

  // In place: 1 is guessed, and the rest made up for.
  p.input = p.grad_input;
  for (const A factor : {A(1), A(2), A(2), A(2)}) {
    p.assumed = Assumed::kGuessedOrOne;
    for (int64_t i = 0; i < count * n; ++i) problem.g.data()[i] = problem.x.data()[i];
    launch_cross_entropy_fwd(p, nullptr);
    const std::vector<double> written = gradient();
    const double ratio = double(factor) / problem.guess;
    problem.grad_output[0] = factor;
    launch_cross_entropy_rescale(p, nullptr);
    for (int64_t i = 0; i < count * n; ++i)
      expect(to_acc(problem.g.at(i / n, i % n)), to_acc(from_acc<T>(A(written[i] * ratio))), 0, "rescaled", i / n,
             i % n);
    p.grad_output_stride = 0;
  }
  expect(problem.guess, 2, 0, "guess in place", 0, 0);
}

template <class T>
void check_length(int64_t n) {
  for (int64_t offset : {0, 1, 3}) check_cross_entropy<T>(3, n, offset, false, Reduction::kMean);
  check_cross_entropy<T>(5, n, 0, true, Reduction::kNone);
  check_cross_entropy<T>(2, n, 0, false, Reduction::kSum);
  check_cross_entropy<T>(3, n, 1, false, Reduction::kMean, {.weight = true, .z = 0.1, .temperature = 0.5});
  check_cross_entropy<T>(3, n, 0, false, Reduction::kMean,
                         {.weight = true, .predictions = true, .smoothing = 0.2, .z = 0.1, .softcap = 4});
  check_cross_entropy<T>(3, n, 1, true, Reduction::kNone, {.predictions = true, .smoothing = 0.1, .z = 0.1});
  check_cross_entropy<T>(2, n, 1, false, Reduction::kSum, {.probabilities = true, .softcap = 3, .temperature = 2});
}

template <class T>
void check_gradients_in_forward(int64_t n) {
  const auto as_before = cuda_on_host::options;
  const auto with_card = [&](int64_t shared_bytes, int multiprocessors, int64_t offset) {
    cuda_on_host::options.shared_bytes = shared_bytes;
    cuda_on_host::options.multiprocessors = multiprocessors;
    check_gradient_in_forward<T>(5, n, offset, false, Reduction::kMean);
    cuda_on_host::options = as_before;
  };
  with_card(10 * 1024, 1, 1);  // the row does not fit on chip; several rows for a block
  if (n > 4096) return;
  with_card(227 * 1024, 4, 3);
  check_gradient_in_forward<T>(5, n, 0, false, Reduction::kSum, {.weight = true, .z = 0.1, .temperature = 0.5});
  check_gradient_in_forward<T>(5, n, 0, false, Reduction::kMean, {.weight = true, .smoothing = 0.1, .softcap = 4});
  check_gradient_in_forward<T>(3, n, 0, false, Reduction::kNone, {.z = 0.1});
  check_gradient_in_forward<T>(130, n < 20 ? n : 3, 0, true, Reduction::kMean, {.weight = true});
}

const Check kCheck = [](bool is_small) {
  if (is_small) {
    check_cross_entropy<float>(2, 2100, 1, false, Reduction::kNone);
    check_cross_entropy<__nv_bfloat16>(9, 70, 0, false, Reduction::kNone);
    check_cross_entropy<float>(2, 1030, 0, false, Reduction::kMean, {.predictions = true, .smoothing = 0.2, .z = 1});
    check_gradient_in_forward<float>(3, 2100, 1, false, Reduction::kMean);
    check_gradient_in_forward<__nv_bfloat16>(9, 70, 0, false, Reduction::kSum);
    return;
  }
  for (int64_t n : {5, 1030, 8200}) check_gradients_in_forward<float>(n);
  check_gradients_in_forward<double>(33);
  check_gradients_in_forward<__half>(1100);
  for (int64_t n : {60, 200, 9000, 17000}) check_gradients_in_forward<__nv_bfloat16>(n);
  check_gradient_in_forward<float>(9000, 5, 0, false, Reduction::kMean, {.weight = true});  // counted beforehand
  check_cross_entropy<float>(2, 1000000, 0, true, Reduction::kNone, {.tied = true});
  for_types_and_lengths([](auto type, int64_t n) { check_length<decltype(type)>(n); });
};

}  // namespace
}  // namespace tse
