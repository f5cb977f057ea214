// Checks of selective_log_softmax.
#include <cmath>
#include <random>
#include <vector>

#include "kernels_check.h"
#include "selective_log_softmax/selective_log_softmax.h"

namespace tse {
namespace {

template <class T>
void check_selective_log_softmax(int64_t count, int64_t n, int64_t k, int64_t offset, bool columns, double softcap) {
  using A = Acc<T>;
  std::mt19937 random(unsigned(n * 13 + count));
  std::normal_distribution<float> normal(0, 3);
  Matrix<T> x(count, n, offset, columns), g(count, n, offset, columns);
  std::vector<int64_t> index(count * k);
  for (int64_t& i : index) i = int64_t(random() % n);
  for (int64_t i = 0; i < count; ++i)
    for (int64_t c = 0; c < n; ++c) x.at(i, c) = from_acc<T>(A(normal(random)));
  std::vector<A> logp(count * k, NAN), entropy(count, NAN);
  std::vector<A> m(count, NAN), sum(count, NAN), others(count, NAN), mean(count, NAN);
  std::vector<A> grad_logp(count * k), grad_entropy(count);
  for (A& v : grad_logp) v = normal(random);
  for (A& v : grad_entropy) v = normal(random);
  SelectiveLogSoftmaxParams p{};
  p.dtype = kDType<T>;
  p.rows = x.rows;
  p.input = x.data();
  p.index = index.data();
  p.k = k;
  p.transform = {0.8, softcap};
  p.row_m = m.data();
  p.row_sum = sum.data();
  p.row_others = others.data();
  p.row_mean = mean.data();
  p.logp = logp.data();
  p.entropy = entropy.data();
  p.grad_rows = g.rows;
  p.grad_input = g.data();
  p.grad_logp = grad_logp.data();
  p.grad_entropy = grad_entropy.data();
  launch_selective_log_softmax_fwd(p, nullptr);
  launch_selective_log_softmax_bwd(p, nullptr);
  for (int64_t i = 0; i < count; ++i) {
    std::vector<double> s(n), slope(n, 1 / 0.8), incoming(n);
    double z = 0, h = 0, total = 0;
    for (int64_t c = 0; c < n; ++c) {
      const double v = to_acc(x.at(i, c)), t = std::tanh(v / softcap);
      s[c] = (softcap > 0 ? softcap * t : v) / 0.8;
      if (softcap > 0) slope[c] *= 1 - t * t;
      z += std::exp(s[c]);
    }
    for (int64_t c = 0; c < n; ++c) h -= std::exp(s[c]) / z * (s[c] - std::log(z));
    for (int64_t j = i * k; j < (i + 1) * k; ++j) {
      expect(logp[j], s[index[j]] - std::log(z), std::is_same_v<T, double> ? 1e-11 : 2e-5, "log-probability", i, j);
      incoming[index[j]] += double(grad_logp[j]);
      total += double(grad_logp[j]);
    }
    expect(entropy[i], h, std::is_same_v<T, double> ? 1e-11 : 2e-5, "entropy", i, 0);
    for (int64_t c = 0; c < n; ++c) {
      const double logp_c = s[c] - std::log(z);
      const double of_s = incoming[c] - std::exp(logp_c) * (total + double(grad_entropy[i]) * (logp_c + h));
      const double largest = 1 + std::abs(incoming[c]) + std::abs(total);
      expect(to_acc(g.at(i, c)), of_s * slope[c], kEps<T> * 4 * largest, "selective gradient", i, c);
    }
  }
}

template <class T>
void check_length(int64_t n) {
  for (int64_t offset : {0, 1, 3}) check_selective_log_softmax<T>(3, n, 1, offset, false, 0);
  check_selective_log_softmax<T>(3, n, 5, 0, true, 0);
  check_selective_log_softmax<T>(2, n, 40, 1, false, 4);
}

const Check kCheck = [](bool is_small) {
  if (is_small) {
    check_selective_log_softmax<float>(2, 1030, 3, 1, false, 0);
    check_selective_log_softmax<__nv_bfloat16>(9, 70, 3, 0, false, 0);
    return;
  }
  for_types_and_lengths([](auto type, int64_t n) { check_length<decltype(type)>(n); });
};

}  // namespace
}  // namespace tse
