// Losses of sparsemax and entmax on CUDA. [CUDA]
//
// The map's kernel has written the threshold of each row, from which its probabilities follow. Forward reads the logits
// once more, and backward reads them once and writes the gradient; the probabilities are never stored.
#include "common/cuda/map_rows.cuh"
#include "common/cuda/reduce.cuh"
#include "entmax/any_alpha.cuh"
#include "entmax_loss/entmax_loss.h"

namespace tse {
namespace {

// 16-byte loads of a thread that are under way together; more would need more registers than there are.
template <class A>
constexpr int kLoads = std::is_same_v<A, double> ? 1 : 2;

// w = (1 - p^c) / c of p > 0; -log p for c = 0.
template <class A>
struct Surprise {
  A c;
  __device__ A operator()(A p) const {
    if (c == 1) return 1 - p;
    if (c == A(0.5)) return 2 - 2 * fast_sqrt(p);
    const A log_p = log(p);
    return c == 0 ? -log_p : -expm1(c * log_p) / c;
  }
};

// Σ of t and of t (x - r), for probabilities or a distribution t; of a distribution also of t w(t).
template <class A>
struct LossSums {
  Compensated<A> mass, linear, surprise;

  __device__ void add(const LossSums& other) {
    mass.add(other.mass);
    linear.add(other.linear);
    surprise.add(other.surprise);
  }
};

template <class A>
__device__ inline double wide(const Compensated<A>& s) {
  return s.rest == s.rest ? double(s.sum) + double(s.rest) : double(s.sum);
}

template <int kRowThreads, class A>
__device__ inline LossSums<A> sum_of_row(const LossSums<A>& s, int& turn) {
  return row_reduce<kRowThreads>(s, turn, [](LossSums<A> a, const LossSums<A>& b) {
    a.add(b);
    return a;
  });
}

__device__ inline void check_class(const EntmaxLossParams& p, bool counts, int64_t target) {
  const bool is_class = p.target == nullptr || (target >= 0 && target < p.map.rows.n);
  device_assert(!counts || is_class,
                p.name == EntmaxLossName::kSparsemax  ? "sparsemax_loss: target: expected a class index or ignore_index"
                : p.name == EntmaxLossName::kEntmax15 ? "entmax15_loss: target: expected a class index or ignore_index"
                                                      : "entmax_loss: target: expected a class index or ignore_index");
}

// The logits or the distribution of a row. The compiler must see that there is no mask.
template <class A>
__device__ inline PreparedElements<A> elements_of(const PreparedRows<A>& rows, int64_t index) {
  PreparedElements<A> elements = rows.elements(index);
  elements.mask = nullptr;
  return elements;
}

// The loss of a row. of_p: the sums over all classes but the own one, whose probability is `own`. of_y: those of a
// distribution. r: the logit that sums are relative to.
template <class A>
__device__ inline double loss_of(const LossSums<A>& of_p, A own, A r, bool has_distribution, const LossSums<A>& of_y,
                                 double alpha, const RowProbabilities<A>& probability, const Surprise<A>& w) {
  const double mass = wide(of_p.mass) + double(own), linear = wide(of_p.linear), max = double(probability.shift.max);
  if (!(mass > 0)) return infinity<double>() - infinity<double>();  // of -inf alone, or with NaN
  if (!(r > -infinity<A>()) || linear == infinity<double>()) return infinity<double>();
  // On the support w(p) + (x - r) is one number, the level: Σ p w(p) follows from the other sums.
  const double level = double(w(probability(probability.shift.max))) + (max - double(r));
  // The last term corrects for what rounding adds to Σ p.
  double loss = linear + (level * mass - linear) / alpha - (mass - 1) * (level - 1 / alpha);
  if (has_distribution) loss += level * (wide(of_y.mass) - 1) - wide(of_y.linear) - wide(of_y.surprise) / alpha;
  return loss < 0 ? 0 : loss;  // NaN stays
}

// y: the distributions, where there are some.
template <class A, int kRowThreads>
__global__ void __launch_bounds__(kBlockThreads<kRowThreads>, kBlocksAtLeast<double, kRowThreads>)
    entmax_loss_fwd_kernel(EntmaxLossParams p, PreparedRows<A> rows, PreparedRows<A> y, float log_n) {
  int turn = 0;
  const int64_t count = row_count(p.map.rows), n = p.map.rows.n;
  const bool has_distribution = p.target == nullptr;
  for (int64_t index = first_row<kRowThreads>(); index < count; index += row_step<kRowThreads>()) {
    const auto x = elements_of(rows, index);
    const auto of_y = elements_of(y, index);
    RowThreshold<A>& threshold = static_cast<RowThreshold<A>*>(p.map.thresholds)[index];
    const int64_t target = target_of(p, index);
    const bool counts = is_counted(p, target);  // the same in all threads of the row
    check_class(p, counts, target);
    const double alpha = p.map.alpha(index);
    const RowProbabilities<A> probability(alpha, log_n, threshold);
    const Surprise<A> w{A(alpha - 1)};
    const A r = has_distribution ? threshold.max : counts ? x[target] : A(0);
    const A reference = r > -infinity<A>() ? r : A(0);
    LossSums<A> of_probabilities, of_distribution;
    const auto add = [&](int64_t i, A v) {
      const A t = i == target ? A(0) : probability(v);
      if (!(t <= 0)) {  // NaN goes on
        of_probabilities.mass.add(t);
        of_probabilities.linear.add(t * (v - reference));
      }
      const A wanted = has_distribution ? of_y[i] : A(0);
      if (wanted <= 0) return;
      of_distribution.mass.add(wanted);
      of_distribution.linear.add(wanted * (v - reference));
      of_distribution.surprise.add(wanted * w(wanted));
    };
    const KeptRow<kRowThreads, A, kLoads<A>, PreparedElements<A>> row(x, n);
    if (counts)
      row.read(
          false,
          [&](int64_t i, const Vec<A>& v) {
#pragma unroll 1
            for (int k = 0; k < Vec<A>::kSize; ++k) add(i + k, v.v[k]);
          },
          add);
    of_probabilities = sum_of_row<kRowThreads>(of_probabilities, turn);
    if (has_distribution) of_distribution = sum_of_row<kRowThreads>(of_distribution, turn);
    if (threadIdx.x % kRowThreads != 0) continue;
    const A own = counts && !has_distribution ? probability(r) : A(0);
    const A loss =
        counts ? A(loss_of(of_probabilities, own, r, has_distribution, of_distribution, alpha, probability, w)) : A(0);
    static_cast<A*>(p.row_loss)[index] = loss;
    threshold.others = A(wide(of_probabilities.mass));
    const bool has_mass = threshold.others + own > 0;
    if (counts && !has_mass) threshold.t = threshold.others = loss;  // NaN, and so is the gradient
  }
}

// Gradient g (p - y); of the own class, g times what its probability lacks to 1.
template <class A, int kRowThreads>
__global__ void __launch_bounds__(kBlockThreads<kRowThreads>, kBlocksAtLeast<double, kRowThreads>)
    entmax_loss_bwd_kernel(EntmaxLossParams p, PreparedRows<A> rows, PreparedRows<A> y, float log_n) {
  const int64_t count = row_count(p.map.rows), n = p.map.rows.n;
  for (int64_t index = first_row<kRowThreads>(); index < count; index += row_step<kRowThreads>()) {
    const auto x = elements_of(rows, index);
    const auto of_y = elements_of(y, index);
    const RowThreshold<A> threshold = static_cast<const RowThreshold<A>*>(p.map.thresholds)[index];
    const int64_t target = target_of(p, index);
    const bool counts = is_counted(p, target), has_distribution = p.target == nullptr;
    check_class(p, counts, target);
    const RowProbabilities<A> probability(p.map.alpha(index), log_n, threshold);
    const double incoming = double(static_cast<const A*>(p.grad_output)[index * p.grad_output_stride]);
    const A g = A(incoming / p.divisor), of_own = -threshold.others * g;
    map_row<A>(KeptRow<kRowThreads, A, kLoads<A>, PreparedElements<A>>(x, n), rows.output(index, x),
               [&](int64_t i, A v) {
                 if (!counts) return A(0);
                 if (i == target) return of_own;
                 const A t = probability(v);
                 return (has_distribution ? t - of_y[i] : t) * g;
               });
  }
}

// kernel_of(A(), plan): the kernel.
template <class KernelOf>
void launch_loss(const char* name, const EntmaxLossParams& p, cudaStream_t stream, const KernelOf& kernel_of) {
  const Rows &x_rows = p.map.rows, &out_rows = p.map.grad_input == nullptr ? x_rows : p.map.grad_input_rows;
  if (row_count(x_rows) == 0) return;
  PreparedRowsParams x{};
  x.map = p.map;
  x.map.output_rows = out_rows;
  x.map.output = p.map.grad_input;
  x.input_dtype = x.output_dtype = p.dtype;
  PreparedRowsParams y = x;
  if (p.distribution != nullptr) {
    y.map.rows = p.distribution_rows;
    y.map.input = p.distribution;
  }
  const auto launch_of = [&](auto zero) {
    using A = decltype(zero);
    with_plan<A, /*kRegisters=*/false, /*kKeeps=*/false>(
        x_rows.n, x_rows.stride_n == 1 && out_rows.stride_n == 1, [&](auto plan) {
          constexpr int kRowThreads = decltype(plan)::kThreads, kThreads = kBlockThreads<kRowThreads>;
          const auto kernel = kernel_of(zero, plan);
          launch(name, kernel, grid_for(row_count(x_rows), kRowsPerBlock<kRowThreads>, kernel, kThreads, 0), kThreads,
                 0, stream, p, PreparedRows<A>{x}, PreparedRows<A>{y}, float(std::log(double(x_rows.n))));
        });
  };
  p.map.dtype == DType::kFloat64 ? launch_of(double()) : launch_of(float());
}

}  // namespace

void launch_entmax_loss_fwd(const EntmaxLossParams& p, cudaStream_t stream) {
  launch_loss("entmax_loss_fwd_kernel", p, stream,
              [](auto zero, auto plan) { return entmax_loss_fwd_kernel<decltype(zero), decltype(plan)::kThreads>; });
}
void launch_entmax_loss_bwd(const EntmaxLossParams& p, cudaStream_t stream) {
  launch_loss("entmax_loss_bwd_kernel", p, stream,
              [](auto zero, auto plan) { return entmax_loss_bwd_kernel<decltype(zero), decltype(plan)::kThreads>; });
}

}  // namespace tse
