// Inputs of several kinds, and what every output is compared with: plain fp64 kernels, a block for each row. [CUDA]
#pragma once
#include "common/cuda/vec.cuh"
#include "gpu_sweep_device.cuh"

namespace sweep {

using tse::from_acc;
using tse::to_acc;

constexpr int kThreads = 256;  // of all kernels here

// ---- inputs ---------------------------------------------------------------------------------------------------------

// What a row holds. The rows of a check take turns.
enum Kind { kRandn, kPeaky, kFlat, kTied, kInfinite, kKinds };
constexpr const char* kKindNames[kKinds] = {"randn", "peaky", "flat", "tied", "-inf"};
constexpr int64_t kIgnored = -100;

// The rows of a shape, and what they hold: all kinds and some ignored targets, or randn alone.
struct Input {
  int64_t rows, n;
  double sigma;
  uint64_t seed;
  bool is_mixed;

  __host__ __device__ Kind kind(int64_t row) const { return is_mixed ? Kind(row % kKinds) : kRandn; }
};

__device__ inline uint64_t hash(uint64_t seed, uint64_t i) {  // splitmix64
  uint64_t z = (seed << 44) + (i + 1) * 0x9e3779b97f4a7c15u;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}
__device__ inline float normal(uint64_t bits) {  // Box-Muller
  const float u = (unsigned(bits >> 32) + 1.0f) * 0x1p-32f, v = unsigned(bits) * 0x1p-32f;
  return sqrtf(-2 * logf(u)) * cospif(2 * v);
}
__device__ inline int64_t class_of(const Input& in, int64_t row) {
  return int64_t(hash(in.seed + 1000, uint64_t(row)) % uint64_t(in.n));
}
// In half of the peaky rows the target is the peak.
__device__ inline int64_t peak_of(const Input& in, int64_t row) {
  return row / kKinds % 2 == 0 ? in.n - 1 - class_of(in, row) : class_of(in, row);
}

__device__ inline float value_of(const Input& in, int64_t row, int64_t c) {
  const uint64_t bits = hash(in.seed, uint64_t(row * in.n + c));
  switch (in.kind(row)) {
    case kPeaky:
      return normal(bits) + (c == peak_of(in, row) ? 30.0f : 0.0f);
    case kFlat:
      return 0.01f * normal(bits);
    case kTied:
      return 0.25f * float(c % 3);
    case kInfinite:
      return bits % 2 == 0 && c != class_of(in, row) ? -tse::infinity<float>() : normal(bits);
    default:
      return float(in.sigma) * normal(bits);
  }
}

template <class T>
__global__ void fill_kernel(Input in, T* x) {
  for (int64_t row = blockIdx.x; row < in.rows; row += gridDim.x)
    for (int64_t c = threadIdx.x; c < in.n; c += kThreads) x[row * in.n + c] = from_acc<T>(value_of(in, row, c));
}
__global__ void fill_targets_kernel(Input in, bool may_ignore, int64_t* target, float* grad_output) {
  for (int64_t row = blockIdx.x * kThreads + threadIdx.x; row < in.rows; row += gridDim.x * kThreads) {
    target[row] = in.is_mixed && may_ignore && row % 4 == 2 ? kIgnored : class_of(in, row);
    grad_output[row] = normal(hash(in.seed + 2000, uint64_t(row)));
  }
}

// ---- references -----------------------------------------------------------------------------------------------------

// Over the threads of the block, in every one of them.
template <class Op>
__device__ inline double block_reduce(double v, const Op& op) {
  TSE_SHARED(double, values, kThreads);
  __syncthreads();
  values[threadIdx.x] = v;
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) values[threadIdx.x] = op(values[threadIdx.x], values[threadIdx.x + half]);
  }
  __syncthreads();
  return values[0];
}
__device__ inline double block_sum(double v) {
  return block_reduce(v, [](double a, double b) { return a + b; });
}
__device__ inline double block_max(double v) {
  return block_reduce(v, [](double a, double b) { return a > b ? a : b; });
}

// With c = alpha - 1: (1 - c w)^(1/c) of w = s + max x - x, for c = 0 exp(-w).
__device__ inline double probability_of(double w, double alpha) {
  const double c = alpha - 1, u = 1 - c * w;
  if (c == 0) return exp(-w);
  if (u <= 0) return 0;
  return alpha == 2 ? u : alpha == 1.5 ? u * u : pow(u, 1 / c);
}
// The w of an element is this minus the element: Σ p = 1 by bisection.
template <class T>
__device__ inline double threshold_of(const T* x, int64_t n, double alpha) {
  double max = -tse::infinity<double>();
  for (int64_t c = threadIdx.x; c < n; c += kThreads) max = fmax(max, double(to_acc(x[c])));
  const double c = alpha - 1, log_n = log(double(n));
  double low = block_max(max), high = low + (c == 0 ? log_n : -expm1(-c * log_n) / c);
  for (int step = 0; step < 50; ++step) {
    const double middle = (low + high) / 2;
    double sum = 0;
    for (int64_t i = threadIdx.x; i < n; i += kThreads) sum += probability_of(middle - double(to_acc(x[i])), alpha);
    (block_sum(sum) > 1 ? low : high) = middle;
  }
  return (low + high) / 2;
}

template <class T>
__device__ inline double log_sum_exp(const T* x, int64_t n) {
  double max = -tse::infinity<double>(), sum = 0;
  for (int64_t c = threadIdx.x; c < n; c += kThreads) max = fmax(max, double(to_acc(x[c])));
  max = block_max(max);
  for (int64_t c = threadIdx.x; c < n; c += kThreads) sum += exp(double(to_acc(x[c])) - max);
  return max + log(block_sum(sum));
}

// Of a row of a loss or of selective log-softmax: grad_input = factor · (p - [c = target]).
struct RowReference {
  double threshold, loss, factor;
};

// The loss of each row: Σ (p - y) x + Σ p w(p) / alpha, where w(p) is threshold - x.
template <class T>
__global__ void loss_reference_kernel(int64_t rows, int64_t n, double alpha, const T* x, const int64_t* target,
                                      RowReference* out) {
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    const T* const of_row = x + row * n;
    const double threshold = alpha == 1 ? log_sum_exp(of_row, n) : threshold_of(of_row, n, alpha);
    const bool counts = target[row] >= 0;
    const double own = counts ? double(to_acc(of_row[target[row]])) : 0;
    double linear = 0, surprise = 0;
    for (int64_t c = threadIdx.x; c < n; c += kThreads) {
      const double v = double(to_acc(of_row[c])), p = probability_of(threshold - v, alpha);
      if (p == 0) continue;
      linear += p * (v - own);
      surprise += p * (threshold - v);
    }
    linear = block_sum(linear);
    surprise = block_sum(surprise);
    if (threadIdx.x == 0) out[row] = {threshold, counts ? linear + surprise / alpha : 0, 0};
  }
}

// The mean loss, and the factor of each row's gradient: by a block. grad_output: of each row, nullptr for 1; `sign` -1
// for log-probabilities, which are negative losses.
__global__ void finish_reference_kernel(int64_t rows, const int64_t* target, const float* grad_output, bool is_mean,
                                        double scale, RowReference* out, double* mean) {
  double loss = 0, counted = 0;
  for (int64_t row = threadIdx.x; row < rows; row += kThreads) {
    loss += out[row].loss;
    counted += target[row] >= 0;
  }
  loss = block_sum(loss);
  counted = block_sum(counted);
  if (threadIdx.x == 0) *mean = loss / counted;
  for (int64_t row = threadIdx.x; row < rows; row += kThreads) {
    const double grad = grad_output == nullptr ? 1 : double(grad_output[row]);
    out[row].factor = target[row] < 0 ? 0 : grad * scale / (is_mean ? counted : 1);
  }
}

// A map, rounded to T: what its backward reads.
template <class T>
__global__ void map_reference_kernel(int64_t rows, int64_t n, double alpha, const T* x, T* y) {
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    const double threshold = threshold_of(x + row * n, n, alpha);
    for (int64_t c = threadIdx.x; c < n; c += kThreads)
      y[row * n + c] = from_acc<T>(float(probability_of(threshold - double(to_acc(x[row * n + c])), alpha)));
  }
}

// Its gradient: s (g - Σ s g / Σ s) with s = p^(2 - alpha) on the support.
template <class T>
__global__ void map_gradient_reference_kernel(int64_t rows, int64_t n, double alpha, const T* y, const T* g, T* out) {
  const auto weight = [&](double p) { return p > 0 ? pow(p, 2 - alpha) : 0.0; };
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    double sum = 0, weights = 0;
    for (int64_t c = threadIdx.x; c < n; c += kThreads) {
      const double s = weight(double(to_acc(y[row * n + c])));
      sum += s * double(to_acc(g[row * n + c]));
      weights += s;
    }
    const double mean = block_sum(sum) / block_sum(weights);
    for (int64_t c = threadIdx.x; c < n; c += kThreads) {
      const double s = weight(double(to_acc(y[row * n + c])));
      out[row * n + c] = from_acc<T>(float(s * (double(to_acc(g[row * n + c])) - mean)));
    }
  }
}

// ---- comparison -----------------------------------------------------------------------------------------------------

// Sums over the rows of one kind.
struct Difference {
  double squares, expected_squares;
  unsigned long long max, expected_max;  // bits of numbers that are not negative, which are ordered as they are
  unsigned long long elements;
};

struct Pair {
  double got, expected;
};

// Compares what pair(row, c) says about each element of the rows. A block works on one row at a time.
template <class F>
__device__ inline void compare(const Input& in, int64_t n, Difference* of_kinds, const F& pair) {
  for (int64_t row = blockIdx.x; row < in.rows; row += gridDim.x) {
    double squares = 0, expected_squares = 0, max = 0, expected_max = 0;
    for (int64_t c = threadIdx.x; c < n; c += kThreads) {
      const Pair p = pair(row, c);
      const double difference = p.got == p.expected ? 0 : fabs(p.got - p.expected);
      squares += difference * difference;  // NaN where one of them is
      expected_squares += p.expected * p.expected;
      max = fmax(max, difference);
      expected_max = fmax(expected_max, fabs(p.expected));
    }
    squares = block_sum(squares);
    expected_squares = block_sum(expected_squares);
    max = block_max(max);
    expected_max = block_max(expected_max);
    if (threadIdx.x != 0) continue;
    Difference& d = of_kinds[in.kind(row)];
    atomicAdd(&d.squares, squares);
    atomicAdd(&d.expected_squares, expected_squares);
    atomicMax(&d.max, static_cast<unsigned long long>(__double_as_longlong(max)));
    atomicMax(&d.expected_max, static_cast<unsigned long long>(__double_as_longlong(expected_max)));
    atomicAdd(&d.elements, static_cast<unsigned long long>(n));
  }
}

// One number of each row: its loss, or with sign -1 its log-probability.
__global__ void compare_rows_kernel(Input in, const float* got, const RowReference* reference, double sign,
                                    Difference* of_kinds) {
  compare(in, 1, of_kinds, [&](int64_t row, int64_t) { return Pair{double(got[row]), sign * reference[row].loss}; });
}
// Of the targets' elements, or of all others, whose gradients are too small to be seen beside those.
template <class T>
__global__ void compare_loss_gradient_kernel(Input in, double alpha, bool at_target, const T* got, const T* x,
                                             const int64_t* target, const RowReference* reference,
                                             Difference* of_kinds) {
  compare(in, in.n, of_kinds, [&](int64_t row, int64_t c) {
    const bool is_target = c == target[row];
    if (is_target != at_target) return Pair{0, 0};
    const RowReference r = reference[row];
    const double p = probability_of(r.threshold - double(to_acc(x[row * in.n + c])), alpha);
    return Pair{double(to_acc(got[row * in.n + c])), r.factor * (p - (is_target ? 1 : 0))};
  });
}
// `expected` has the rounding of T itself.
template <class T>
__global__ void compare_tensor_kernel(Input in, const T* got, const T* expected, Difference* of_kinds) {
  compare(in, in.n, of_kinds, [&](int64_t row, int64_t c) {
    return Pair{double(to_acc(got[row * in.n + c])), double(to_acc(expected[row * in.n + c]))};
  });
}
}  // namespace sweep
