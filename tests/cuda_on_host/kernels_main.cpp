// Runs every kernel at small shapes against a double reference: the program that the sanitizers watch.
// Exit code 0 and "ok" where all values are right. Inputs are heap blocks of their exact size, so that
// AddressSanitizer sees one element too many. Argument: "tsan" for shapes that ThreadSanitizer can afford.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <exception>
#include <memory>
#include <random>
#include <vector>

#include "common/cuda/vec.cuh"
#include "cross_entropy/cross_entropy.h"
#include "entmax/entmax.h"

using namespace tse;

namespace {

int failures = 0;

void expect(double got, double want, double tolerance, const char* what, int64_t row, int64_t column) {
  if (std::abs(got - want) <= tolerance || (std::isnan(got) && std::isnan(want)) || got == want) return;
  if (++failures <= 5) std::printf("%s[%ld, %ld]: got %.9g, expected %.9g\n", what, long(row), long(column), got, want);
}

template <class T>
constexpr DType kDType = std::is_same_v<T, float>    ? DType::kFloat32
                         : std::is_same_v<T, double> ? DType::kFloat64
                         : std::is_same_v<T, __half> ? DType::kFloat16
                                                     : DType::kBFloat16;
template <class T>
constexpr double kEps = std::is_same_v<T, double>   ? 1e-12
                        : std::is_same_v<T, float>  ? 2e-6
                        : std::is_same_v<T, __half> ? 1e-3
                                                    : 8e-3;

// rows × n elements in memory of their exact size, with `offset` elements before the first row (misalignment).
template <class T>
struct Matrix {
  Rows rows;
  std::unique_ptr<T[]> memory;
  int64_t offset;
  Matrix(int64_t count, int64_t n, int64_t offset, bool columns)
      : rows{1, n, count, 0, columns ? count : 1, columns ? 1 : n}, memory(new T[offset + count * n]), offset(offset) {}
  T* data() { return memory.get() + offset; }
  T& at(int64_t row, int64_t c) { return data()[row_offset(rows, row) + c * rows.stride_n]; }
};

template <class T>
void check_cross_entropy(int64_t count, int64_t n, int64_t offset, bool columns, Reduction reduction) {
  using A = Acc<T>;
  std::mt19937 random(unsigned(n * 31 + count));
  std::normal_distribution<float> normal(0, 3);
  Matrix<T> x(count, n, offset, columns), g(count, n, offset, columns);
  std::vector<int64_t> target(count);
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t c = 0; c < n; ++c) x.at(i, c) = from_acc<T>(A(normal(random)));
    target[i] = i == 1 ? -100 : int64_t(random() % n);
  }
  std::vector<A> row_loss(count, NAN), grad_output(reduction == Reduction::kNone ? count : 1);
  for (A& v : grad_output) v = normal(random);
  std::vector<A> row_m(count, NAN), row_sum(count, NAN);
  double total_weight = NAN;
  A loss = NAN;
  CrossEntropyParams p{};
  p.dtype = kDType<T>;
  p.rows = x.rows;
  p.input = x.data();
  p.target = target.data();
  p.ignore_index = -100;
  p.reduction = reduction;
  p.row_loss = row_loss.data();
  p.row_m = row_m.data();
  p.row_sum = row_sum.data();
  p.loss = &loss;
  p.total_weight = &total_weight;
  p.grad_rows = g.rows;
  p.grad_input = g.data();
  p.grad_output = grad_output.data();
  p.grad_output_stride = reduction == Reduction::kNone;
  launch_cross_entropy_fwd(p, nullptr);
  launch_cross_entropy_bwd(p, nullptr);
  double total = 0, counted = 0;
  for (int64_t i = 0; i < count; ++i) counted += target[i] >= 0;
  for (int64_t i = 0; i < count; ++i) {
    double max = -INFINITY, sum = 0;
    for (int64_t c = 0; c < n; ++c) max = std::max(max, double(to_acc(x.at(i, c))));
    for (int64_t c = 0; c < n; ++c) sum += std::exp(double(to_acc(x.at(i, c))) - max);
    const double lse = max + std::log(sum), row = target[i] < 0 ? 0 : lse - double(to_acc(x.at(i, target[i])));
    total += row;
    expect(row_loss[i], row, std::is_same_v<T, double> ? 1e-12 : 1e-5, "loss", i, 0);
    const double factor = reduction == Reduction::kNone   ? double(grad_output[i])
                          : reduction == Reduction::kMean ? double(grad_output[0]) / counted
                                                          : double(grad_output[0]);
    for (int64_t c = 0; c < n; ++c) {
      const double want = target[i] < 0 ? 0 : (std::exp(double(to_acc(x.at(i, c))) - lse) - (c == target[i])) * factor;
      expect(to_acc(g.at(i, c)), want, kEps<T> * std::abs(factor), "gradient", i, c);
    }
  }
  if (reduction != Reduction::kNone)
    expect(loss, reduction == Reduction::kMean ? total / counted : total, 1e-5 * (1 + total), "reduced", 0, 0);
}

template <class T>
void check_sparsemax(int64_t count, int64_t n, int64_t offset, bool columns, float scale) {
  using A = Acc<T>;
  std::mt19937 random(unsigned(n * 17 + count));
  std::normal_distribution<float> normal(0, scale);
  Matrix<T> x(count, n, offset, columns), y(count, n, offset, columns), g(count, n, 0, columns),
      out(count, n, 0, columns);
  for (int64_t i = 0; i < count; ++i)
    for (int64_t c = 0; c < n; ++c) {
      x.at(i, c) = from_acc<T>(A(normal(random)));
      g.at(i, c) = from_acc<T>(A(normal(random)));
    }
  EntmaxParams p{};
  p.dtype = kDType<T>;
  p.rows = x.rows;
  p.input = x.data();
  p.output_rows = y.rows;
  p.output = y.data();
  p.grad_output_rows = g.rows;
  p.grad_output = g.data();
  p.grad_input_rows = out.rows;
  p.grad_input = out.data();
  launch_sparsemax_fwd(p, nullptr);
  launch_sparsemax_bwd(p, nullptr);
  for (int64_t i = 0; i < count; ++i) {
    std::vector<double> z(n);
    for (int64_t c = 0; c < n; ++c) z[c] = to_acc(x.at(i, c));
    std::vector<double> sorted = z;
    std::sort(sorted.rbegin(), sorted.rend());
    double sum = 0, tau = 0, mean = 0;
    for (int64_t k = 0; k < n; ++k) {
      sum += sorted[k];
      if (1 + (k + 1) * sorted[k] > sum) tau = (sum - 1) / double(k + 1);
    }
    int64_t support = 0;
    for (int64_t c = 0; c < n; ++c) {
      expect(to_acc(y.at(i, c)), std::max(0.0, z[c] - tau), kEps<T>, "probability", i, c);
      if (to_acc(y.at(i, c)) > 0) {
        mean += double(to_acc(g.at(i, c)));
        ++support;
      }
    }
    mean /= double(support);
    for (int64_t c = 0; c < n; ++c) {
      const double want = to_acc(y.at(i, c)) > 0 ? double(to_acc(g.at(i, c))) - mean : 0;
      expect(to_acc(out.at(i, c)), want, kEps<T> * (1 + std::abs(want)), "sparsemax gradient", i, c);
    }
  }
}

template <class T>
void check_all(const std::vector<int64_t>& widths) {
  for (int64_t n : widths) {
    for (int64_t offset : {0, 1, 3}) {
      check_cross_entropy<T>(3, n, offset, false, Reduction::kMean);
      check_sparsemax<T>(3, n, offset, false, 1);
    }
    check_cross_entropy<T>(5, n, 0, true, Reduction::kNone);
    check_cross_entropy<T>(2, n, 0, false, Reduction::kSum);
    check_sparsemax<T>(3, n, 0, true, 1);
    check_sparsemax<T>(2, n, 0, false, 0.01f);
  }
}

}  // namespace

int main(int argc, char** argv) {
  const bool tsan = argc > 1 && std::strcmp(argv[1], "tsan") == 0;
  try {
    // A warp per row, several rows a block; a block per row; rows wider than shared memory.
    if (tsan) {
      check_cross_entropy<float>(2, 1030, 1, false, Reduction::kNone);
      check_cross_entropy<__nv_bfloat16>(9, 70, 0, false, Reduction::kNone);
      check_sparsemax<float>(2, 1030, 0, false, 1);
      check_sparsemax<__half>(9, 70, 1, false, 1);
    } else {
      check_all<float>({1, 5, 33, 1000, 1030, 12030, 12300});
      check_all<double>({7, 1030});
      check_all<__half>({8, 1031});
      check_all<__nv_bfloat16>({13, 1029, 8200});
    }
  } catch (const std::exception& error) {
    std::printf("%s\n", error.what());
    return 2;
  }
  if (failures != 0) {
    std::printf("%d values differ\n", failures);
    return 1;
  }
  std::printf("ok\n");
}
