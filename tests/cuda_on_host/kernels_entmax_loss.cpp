// Checks of the losses of sparsemax and entmax: the map's thresholds, then loss and gradient.
#include "entmax_loss/entmax_loss.h"

#include "entmax/entmax.h"
#include "kernels_maps.h"

namespace tse {
namespace {

// w = (1 - p^c) / c with c = alpha - 1; -log p for c = 0.
double surprise_of(double p, double alpha) {
  if (p <= 0) return 0;
  return alpha == 1 ? -std::log(p) : -std::expm1((alpha - 1) * std::log(p)) / (alpha - 1);
}

template <class T>
void check_entmax_loss(double alpha, int64_t count, int64_t n, int64_t offset, bool columns, bool has_distribution) {
  using A = Acc<T>;
  std::mt19937 random(unsigned(n * 7 + count));
  std::normal_distribution<float> normal(0, 2);
  std::uniform_real_distribution<float> uniform(0, 1);
  Matrix<T> x(count, n, offset, columns), y(count, n, 1, columns), grad(count, n, offset, columns);
  std::vector<RowThreshold<A>> thresholds(count);
  std::vector<int64_t> target(count);
  std::vector<A> loss(count, A(NAN)), grad_output(count);
  for (int64_t i = 0; i < count; ++i) {
    double sum = 0;
    std::vector<double> weights(n);
    for (double& v : weights) sum += v = random() % 3 == 0 ? 0 : uniform(random);
    for (int64_t c = 0; c < n; ++c) {
      x.at(i, c) = from_acc<T>(A(normal(random)));
      y.at(i, c) = from_acc<T>(A(sum == 0 ? 1.0 / n : weights[c] / sum));
    }
    target[i] = i == 1 ? -100 : int64_t(random() % n);
    grad_output[i] = normal(random);
  }
  EntmaxLossParams q{};
  q.map.dtype = kDType<A>;
  q.map.rows = x.rows;
  q.map.input = x.data();
  q.map.output_rows = x.rows;
  q.map.thresholds = thresholds.data();
  q.map.grad_input_rows = grad.rows;
  q.map.grad_input = grad.data();
  q.map.alpha.same = alpha;
  q.dtype = kDType<T>;
  q.target = has_distribution ? nullptr : target.data();
  q.distribution = has_distribution ? y.data() : nullptr;
  if (has_distribution) q.distribution_rows = y.rows;
  q.ignore_index = -100;
  q.row_loss = loss.data();
  q.grad_output = grad_output.data();
  q.grad_output_stride = 1;
  q.divisor = 2;
  PreparedRowsParams map{};
  map.map = q.map;
  map.input_dtype = q.dtype;
  map.output_dtype = q.dtype;
  launch_prepared_entmax_fwd(map, nullptr);
  launch_entmax_loss_fwd(q, nullptr);
  launch_entmax_loss_bwd(q, nullptr);
  for (int64_t i = 0; i < count; ++i) {
    double max = -INFINITY, want = 0;
    for (int64_t c = 0; c < n; ++c) max = std::fmax(to_acc(x.at(i, c)), max);
    std::vector<double> d(n);
    for (int64_t c = 0; c < n; ++c) d[c] = max - double(to_acc(x.at(i, c)));
    const Map reference = {.alpha = alpha};
    const double shift = reference.shift(d);
    const bool counts = has_distribution || target[i] != -100;
    for (int64_t c = 0; c < n && counts; ++c) {
      const double v = reference.p(shift + d[c]), t = has_distribution ? double(to_acc(y.at(i, c))) : c == target[i];
      want += t * (d[c] + shift) - v * d[c] + (v * surprise_of(v, alpha) - t * surprise_of(t, alpha)) / alpha;
    }
    if (counts) want -= shift;  // what a rounding of Σ t is worth
    expect(loss[i], want, std::is_same_v<A, double> ? 1e-10 : 2e-5 * (1 + want), "entmax loss", i, 0);
    for (int64_t c = 0; c < n; ++c) {
      const double v = reference.p(shift + d[c]), t = has_distribution ? double(to_acc(y.at(i, c))) : c == target[i];
      const double of_c = counts ? (v - t) * double(grad_output[i]) / 2 : 0;
      expect(to_acc(grad.at(i, c)), of_c, kEps<T> * (0.2 + std::abs(of_c)), "entmax loss gradient", i, c);
    }
  }
}

const Check kCheck = [](bool is_small) {
  if (is_small) {
    for (bool has_distribution : {false, true})
      check_entmax_loss<__nv_bfloat16>(1.5, 3, 2100, 1, false, has_distribution);
    return;
  }
  for (double alpha : {1.0, 1.3, 1.5, 2.0, 2.5})
    for (bool has_distribution : {false, true}) {
      for (int64_t n : {1, 5, 70, 1030, 9000}) check_entmax_loss<float>(alpha, 3, n, n % 3, false, has_distribution);
      check_entmax_loss<double>(alpha, 2, 300, 1, false, has_distribution);
      for (int64_t n : {13, 1029, 9001}) check_entmax_loss<__nv_bfloat16>(alpha, 2, n, 1, false, has_distribution);
      check_entmax_loss<__half>(alpha, 5, 33, 0, true, has_distribution);
    }
};

}  // namespace
}  // namespace tse
