// What the checks of all operators share: a list of them, comparing with a reference, matrices of their exact size.
#pragma once
#include <cmath>
#include <cstdio>
#include <memory>
#include <stdexcept>
#include <vector>

#include "common/cuda/vec.cuh"

namespace tse {

inline std::vector<void (*)(bool is_small)>& checks() {
  static std::vector<void (*)(bool)> all;
  return all;
}
struct Check {  // of an operator, made before main
  template <class Run>
  Check(Run run) {
    checks().push_back(run);
  }
};

inline int failures = 0;

inline void expect(double got, double want, double tolerance, const char* what, int64_t row, int64_t column) {
  if (std::abs(got - want) <= tolerance || (std::isnan(got) && std::isnan(want)) || got == want) return;
  std::printf("%s[%ld, %ld]: got %.9g, expected %.9g\n", what, long(row), long(column), got, want);
  if (++failures == 5) throw std::runtime_error("and so on");
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

// Calls f(T(), n) for rows of every type in every way that a row is walked: by a part of a warp, a warp or a block; in
// registers, in shared memory, and wider than that.
template <class F>
void for_types_and_lengths(const F& f) {
  for (int64_t n : {1, 5, 33, 300, 1000, 2100, 12030, 12300}) f(float(), n);
  for (int64_t n : {7, 1030}) f(double(), n);
  for (int64_t n : {8, 1031}) f(__half(), n);
  for (int64_t n : {13, 1029, 8200, 17001}) f(__nv_bfloat16(), n);
}

}  // namespace tse
