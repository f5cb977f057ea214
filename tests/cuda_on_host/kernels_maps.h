// Checks of the row maps, forward and backward, for each way in which a row is walked.
#pragma once
#include <algorithm>
#include <cmath>
#include <random>
#include <vector>

#include "common/row_params.h"
#include "kernels_check.h"

namespace tse {

enum class Fill { kNormal, kTied, kOneSupported, kAscending, kNan, kInf, kMasked };
enum class Mask { kNone, kBool, kAdded };

struct Map {
  const char *value, *gradient;  // as they are reported
  double alpha;
  bool is_log;
  void (*launch_fwd)(const RowMapParams&, cudaStream_t);  // nullptr: all rows are prepared
  void (*launch_prepared_fwd)(const PreparedRowsParams&, cudaStream_t);
  void (*launch_bwd)(const RowMapParams&, cudaStream_t);

  // With c = alpha - 1: (1 - c w)^(1/c) of w = s + max x - x, for c = 0 exp(-w); NaN stays.
  double p(double w) const {
    const double c = alpha - 1, u = 1 - c * w;
    if (c == 0) return std::exp(-w);
    if (u <= 0) return 0;
    return alpha == 2 ? u : alpha == 1.5 ? u * u : std::pow(u, 1 / c);
  }
  // s, by bisection; d: max x - x.
  double shift(const std::vector<double>& d) const {
    const double c = alpha - 1, log_n = std::log(double(d.size()));
    double low = 0, high = c == 0 ? log_n : -std::expm1(-c * log_n) / c;
    for (int i = 0; i < 55; ++i) {
      const double s = (low + high) / 2;
      double sum = 0;
      for (double v : d) sum += p(s + v);
      (sum > 1 ? low : high) = s;
    }
    return low;
  }
};
#define TSE_MAP(name, alpha, is_log, fwd) \
  {#name " value", #name " gradient", alpha, is_log, fwd, launch_prepared_##name##_fwd, launch_##name##_bwd}

// A row's result against the reference, and its gradient against that of the result. z: the prepared logits.
template <class Y>
void check_row_of_map(const Map& map, const std::vector<double>& z, Matrix<Y>& y, Matrix<Y>& g, Matrix<Y>& out,
                      int64_t i, double scale, double temperature, bool is_nan) {
  const int64_t n = y.rows.n;
  double max = -INFINITY, weighted = 0, weights = 0;
  for (double v : z) max = std::fmax(v, max);
  std::vector<double> d(n), s(n);
  for (int64_t c = 0; c < n; ++c) d[c] = (max == -INFINITY ? 0 : max) - z[c];
  const double shift = is_nan ? NAN : max == -INFINITY ? 0 : map.shift(d);
  const auto is_inside = [&](double v) { return map.is_log ? v != -INFINITY : !(v <= 0); };
  for (int64_t c = 0; c < n; ++c) {
    const double w = shift + d[c], want = map.is_log ? -w : map.p(w), got = to_acc(y.at(i, c));
    // Above 2 small probabilities feel what the rounding of all others does to the threshold.
    const double allowed = map.alpha > 2 ? std::max(10 * kEps<Y>, 1e-8) : kEps<Y>;
    expect(got, want, allowed * (std::abs(want) + 0.2 * scale), map.value, i, c);
    s[c] = !is_inside(got) ? 0 : map.is_log ? 1 : std::pow(got, 2 - map.alpha);
    weighted += s[c] * double(to_acc(g.at(i, c)));
    weights += s[c];
  }
  const double mean = is_nan ? NAN : weighted / weights;
  for (int64_t c = 0; c < n; ++c) {
    const double got = to_acc(y.at(i, c)), incoming = to_acc(g.at(i, c));
    double want = 0;
    if (is_inside(got)) want = map.is_log ? incoming - std::exp(got) * weighted : s[c] * (incoming - mean);
    if (is_nan) want = is_inside(got) ? NAN : 0;
    const double terms = map.is_log ? std::sqrt(double(n)) : std::max(s[c], 1.0);
    const double tolerance = kEps<Y> * (scale * terms + std::abs(want));
    expect(to_acc(out.at(i, c)), want / temperature, tolerance / temperature, map.gradient, i, c);
  }
}

struct How {
  bool columns = false, is_prepared = false;
  Fill fill = Fill::kNormal;
  int64_t g_offset = 0;
  Mask mask = Mask::kNone;
  double temperature = 1;
};

// Logits of X, results of Y.
template <class X, class Y = X>
void check_map(const Map& map, int64_t count, int64_t n, int64_t offset, float scale, const How& how = {}) {
  using A = std::conditional_t<std::is_same_v<X, double> || std::is_same_v<Y, double>, double, float>;
  const Fill fill = how.fill;
  std::mt19937 random(unsigned(n * 17 + count));
  std::normal_distribution<float> normal(0, scale);
  Matrix<X> x(count, n, offset, how.columns);
  Matrix<Y> y(count, n, offset, how.columns), g(count, n, how.g_offset, how.columns),
      out(count, n, how.g_offset, how.columns);
  std::vector<A> added(n);  // the same mask for all rows
  std::unique_ptr<bool[]> kept(new bool[n]);
  for (int64_t c = 0; c < n; ++c) {
    kept[c] = c % 3 != 1 || c == n * 5 / 7;
    added[c] = kept[c] ? A(normal(random)) : -std::numeric_limits<A>::infinity();
  }
  std::vector<std::vector<double>> z(count, std::vector<double>(n));
  for (int64_t i = 0; i < count; ++i)
    for (int64_t c = 0; c < n; ++c) {
      float v = normal(random);
      if (fill == Fill::kTied) v = -3;
      if (fill == Fill::kOneSupported) v = c == n * 5 / 7 ? 40 : v;
      if (fill == Fill::kAscending) v = float(c) / 256;  // the bound rises all the way
      if (fill == Fill::kNan && c == n - 1) v = NAN;
      if (fill == Fill::kInf && c == n / 2) v = INFINITY;
      if (fill == Fill::kMasked && (i != 1 || c % 3 != 0)) v = -INFINITY;
      x.at(i, c) = from_acc<X>(Acc<X>(v));
      y.at(i, c) = from_acc<Y>(Acc<Y>(-1));
      g.at(i, c) = from_acc<Y>(Acc<Y>(normal(random)));
      z[i][c] = double(to_acc(x.at(i, c))) / how.temperature;
      if (how.mask == Mask::kBool && !kept[c]) z[i][c] = -INFINITY;
      if (how.mask == Mask::kAdded) z[i][c] += double(added[c]);
    }
  RowMapParams p{};
  p.dtype = kDType<Y>;
  p.rows = x.rows;
  p.input = x.data();
  p.output_rows = y.rows;
  p.output = y.data();
  p.grad_output_rows = g.rows;
  p.grad_output = g.data();
  p.grad_input_rows = out.rows;
  p.grad_input = out.data();
  p.alpha.same = map.alpha;
  p.temperature.same = how.temperature;
  if (how.is_prepared || map.launch_fwd == nullptr) {
    PreparedRowsParams q{};
    q.map = p;
    q.map.dtype = kDType<A>;
    q.input_dtype = kDType<X>;
    q.output_dtype = kDType<Y>;
    q.temperature.same = how.temperature;
    q.mask_is_bool = how.mask == Mask::kBool;
    q.mask_stride_n = 1;
    if (how.mask != Mask::kNone) q.mask = q.mask_is_bool ? static_cast<const void*>(kept.get()) : added.data();
    map.launch_prepared_fwd(q, nullptr);
  } else {
    map.launch_fwd(p, nullptr);
  }
  map.launch_bwd(p, nullptr);
  const bool is_nan = fill == Fill::kNan || fill == Fill::kInf;
  for (int64_t i = 0; i < count; ++i)
    check_row_of_map(map, z[i], y, g, out, i, scale / std::min(how.temperature, 1.0), how.temperature, is_nan);
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
        check_map<T>(map, 3, n, offset, 1);
        check_map<T>(map, 2, n, offset, 0.001f, {.g_offset = 1});  // all are in the support, or many
        check_map<T>(map, 2, n, offset, 1, {.is_prepared = true, .mask = Mask::kBool});
      }
      check_map<T>(map, 2, n, 1, 1, {.fill = Fill::kTied});
      check_map<T>(map, 2, n, 1, 1, {.fill = Fill::kOneSupported});
      check_map<T>(map, 2, n, 0, 1, {.fill = Fill::kAscending, .g_offset = 3});
      check_map<T>(map, 2, n, 1, 1, {.fill = Fill::kNan});
      check_map<T>(map, 2, n, 1, 1, {.fill = Fill::kInf});
      check_map<T>(map, 3, n, 1, 1, {.fill = Fill::kMasked});
      check_map<T>(map, 2, n, 1, 1, {.is_prepared = true, .mask = Mask::kAdded, .temperature = 0.5});
      check_map<T>(map, 2, n, 0, 1, {.is_prepared = true, .mask = Mask::kAdded, .temperature = 3});
      check_map<T, float>(map, 2, n, 3, 1, {.is_prepared = true, .temperature = 0.7});
      cuda_on_host::options.shared_bytes = shared;
    }
    check_map<T>(map, 3, n, 0, 1, {.columns = true});
    check_map<T>(map, 2, n, 0, 1, {.columns = true, .fill = Fill::kNan});
    check_map<T>(map, 2, n, 0, 1, {.columns = true, .is_prepared = true, .mask = Mask::kBool, .temperature = 2});
  }
}

inline void check_map_everywhere(const Map& map, bool is_small) {
  if (is_small) {
    const auto as_before = cuda_on_host::options;
    cuda_on_host::options.shared_bytes = 8 * 1024;
    check_map<float>(map, 2, 2100, 0, 1);
    check_map<__half>(map, 9, 70, 1, 1);
    check_map<__nv_bfloat16>(map, 17, 33, 1, 1, {.is_prepared = true, .mask = Mask::kBool});
    check_map<float>(map, 2, 8250, 1, 0.001f);
    cuda_on_host::options = as_before;
    return;
  }
  check_map_regimes<float>(map, {1, 5, 33, 100, 500, 1000, 2100, 9000});
  check_map_regimes<double>(map, {7, 70, 1030});
  check_map_regimes<__half>(map, {8, 300, 1031});
  check_map_regimes<__nv_bfloat16>(map, {13, 65, 1024, 1029, 9000, 17000});
  check_map<__nv_bfloat16>(map, 1, 40000, 1, 1);
  for (const float scale : {1.f, 1e-3f}) check_map<float>(map, 1, 270001, 1, scale);  // > 64 · 1024 vectors
}

}  // namespace tse
