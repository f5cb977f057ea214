// Checks of the row maps: sparsemax and entmax15, forward and backward, for each way in which a row is walked.
#pragma once
#include <algorithm>
#include <cmath>
#include <random>
#include <vector>

#include "entmax/entmax.h"
#include "kernels_check.h"
#include "sparsemax/sparsemax.h"

namespace tse {

enum class Fill { kNormal, kTied, kOneSupported, kAscending, kNan, kInf, kMasked };

struct Map {
  double alpha;
  void (*launch_fwd)(const RowMapParams&, cudaStream_t);
  void (*launch_bwd)(const RowMapParams&, cudaStream_t);
  const char *probability, *gradient;

  // (alpha - 1) (z - tau) to the power 1 / (alpha - 1); NaN stays.
  double p(double z, double tau) const {
    const double u = z - tau <= 0 ? 0 : (alpha - 1) * (z - tau);
    return alpha == 2 ? u : u * u;
  }
  // By bisection; z: relative to the largest.
  double threshold(const std::vector<double>& z) const {
    double low = -1 / (alpha - 1), high = 0;
    for (int i = 0; i < 55; ++i) {
      const double tau = (low + high) / 2;
      double sum = 0;
      for (double v : z) sum += p(v, tau);
      (sum > 1 ? low : high) = tau;
    }
    return low;
  }
};
constexpr Map kSparsemax = {2, launch_sparsemax_fwd, launch_sparsemax_bwd, "sparsemax probability",
                            "sparsemax gradient"};
constexpr Map kEntmax15 = {1.5, launch_entmax15_fwd, launch_entmax15_bwd, "entmax15 probability", "entmax15 gradient"};

// A row's result against the reference, and its gradient against that of the result.
template <class T>
void check_row_of_map(const Map& map, Matrix<T>& x, Matrix<T>& y, Matrix<T>& g, Matrix<T>& out, int64_t i, double scale,
                      bool is_nan) {
  const int64_t n = x.rows.n;
  double max = -INFINITY, weighted = 0, weights = 0;
  for (int64_t c = 0; c < n; ++c) max = std::fmax(to_acc(x.at(i, c)), max);
  std::vector<double> z(n), s(n);
  for (int64_t c = 0; c < n; ++c) z[c] = to_acc(x.at(i, c)) - (max == -INFINITY ? 0 : max);
  const double tau = is_nan ? NAN : map.threshold(z);
  for (int64_t c = 0; c < n; ++c) {
    const double want = map.p(z[c], tau), got = to_acc(y.at(i, c));
    expect(got, want, kEps<T> * (want + 0.2 * scale), map.probability, i, c);
    s[c] = got <= 0 ? 0 : std::pow(got, 2 - map.alpha);
    weighted += s[c] * double(to_acc(g.at(i, c)));
    weights += s[c];
  }
  const double mean = is_nan ? NAN : weighted / weights;
  for (int64_t c = 0; c < n; ++c) {
    const double want = to_acc(y.at(i, c)) <= 0 ? 0 : s[c] * (double(to_acc(g.at(i, c))) - mean);
    expect(to_acc(out.at(i, c)), want, kEps<T> * (scale + std::abs(want)), map.gradient, i, c);
  }
}

template <class T>
void check_map(const Map& map, int64_t count, int64_t n, int64_t offset, bool columns, float scale,
               Fill fill = Fill::kNormal, int64_t g_offset = 0) {
  using A = Acc<T>;
  std::mt19937 random(unsigned(n * 17 + count));
  std::normal_distribution<float> normal(0, scale);
  Matrix<T> x(count, n, offset, columns), y(count, n, offset, columns), g(count, n, g_offset, columns),
      out(count, n, g_offset, columns);
  for (int64_t i = 0; i < count; ++i)
    for (int64_t c = 0; c < n; ++c) {
      float v = normal(random);
      if (fill == Fill::kTied) v = -3;
      if (fill == Fill::kOneSupported) v = c == n * 5 / 7 ? 40 : v;
      if (fill == Fill::kAscending) v = float(c) / 256;  // the bound rises all the way
      if (fill == Fill::kNan && c == n - 1) v = NAN;
      if (fill == Fill::kInf && c == n / 2) v = INFINITY;
      if (fill == Fill::kMasked && (i != 1 || c % 3 != 0)) v = -INFINITY;
      x.at(i, c) = from_acc<T>(A(v));
      y.at(i, c) = from_acc<T>(A(-1));
      g.at(i, c) = from_acc<T>(A(normal(random)));
    }
  RowMapParams p{};
  p.dtype = kDType<T>;
  p.rows = x.rows;
  p.input = x.data();
  p.output_rows = y.rows;
  p.output = y.data();
  p.grad_output_rows = g.rows;
  p.grad_output = g.data();
  p.grad_input_rows = out.rows;
  p.grad_input = out.data();
  map.launch_fwd(p, nullptr);
  map.launch_bwd(p, nullptr);
  const bool is_nan = fill == Fill::kNan || fill == Fill::kInf;
  for (int64_t i = 0; i < count; ++i) check_row_of_map(map, x, y, g, out, i, scale, is_nan);
}

// A row in registers of 8 lanes or a warp, in a block's shared memory, and beyond what a card with less has.
template <class T>
void check_map_regimes(const Map& map, const std::vector<int64_t>& widths) {
  const int64_t shared = cuda_on_host::options.shared_bytes;
  for (int64_t n : widths) {
    for (const int64_t bytes : {shared, int64_t(9 * 1024)}) {  // 3 KiB for rows
      if (n <= 1024 && bytes != shared) continue;
      cuda_on_host::options.shared_bytes = bytes;
      for (int64_t offset : {0, 1, 3}) {
        check_map<T>(map, 3, n, offset, false, 1);
        check_map<T>(map, 2, n, offset, false, 0.001f, Fill::kNormal, 1);  // all are in the support, or many
      }
      check_map<T>(map, 2, n, 1, false, 1, Fill::kTied);
      check_map<T>(map, 2, n, 1, false, 1, Fill::kOneSupported);
      check_map<T>(map, 2, n, 0, false, 1, Fill::kAscending, 3);
      check_map<T>(map, 2, n, 1, false, 1, Fill::kNan);
      check_map<T>(map, 2, n, 1, false, 1, Fill::kInf);
      check_map<T>(map, 3, n, 1, false, 1, Fill::kMasked);
      cuda_on_host::options.shared_bytes = shared;
    }
    check_map<T>(map, 3, n, 0, true, 1);
    check_map<T>(map, 2, n, 0, true, 1, Fill::kNan);
  }
}

inline void check_map_everywhere(const Map& map) {
  check_map_regimes<float>(map, {1, 5, 33, 100, 500, 1000, 2100, 9000});
  check_map_regimes<double>(map, {7, 70, 1030});
  check_map_regimes<__half>(map, {8, 300, 1031});
  check_map_regimes<__nv_bfloat16>(map, {13, 65, 1024, 1029, 9000, 17000});
  check_map<__nv_bfloat16>(map, 1, 40000, 1, false, 1);
  for (const float scale : {1.f, 1e-3f}) check_map<float>(map, 1, 270001, 1, false, scale);  // > 64 · 1024 vectors
}

}  // namespace tse
