// Rows of the losses of sparsemax and entmax on CUDA. [CUDA]
//
// The map's kernel has written the probabilities; from these and the logits come loss and gradient. A row's logits are
// read once and kept in shared memory.
#include "entmax_loss/entmax_loss.h"

#include "common/cuda/map_rows.cuh"
#include "common/cuda/reduce.cuh"

namespace tse {
namespace {

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

// Σ of t, of t (x - r) and of t w(t), for probabilities or a distribution t.
template <class A>
struct LossSums {
  Compensated<A> mass, linear, surprise;

  // kCount elements.
  template <int kCount, class T, class X>
  __device__ void add(const T& t, const X& x, A r, const Surprise<A>& w) {
    A of_mass = 0, of_linear = 0, of_surprise = 0;
#pragma unroll 1
    for (int k = 0; k < kCount; ++k) {
      const A v = t(k);
      if (v <= 0) continue;  // NaN goes on
      of_mass += v;
      of_linear += v * (x(k) - r);
      of_surprise += v * w(v);
    }
    mass.add(of_mass);
    linear.add(of_linear);
    surprise.add(of_surprise);
  }
};

template <class A>
__device__ inline double wide(const Compensated<A>& s) {
  return s.rest == s.rest ? double(s.sum) + double(s.rest) : double(s.sum);
}

template <int kRowThreads, class A>
__device__ inline LossSums<A> sum_of_row(const LossSums<A>& s, int& turn) {
  return row_reduce<kRowThreads>(s, turn, [](LossSums<A> a, const LossSums<A>& b) {
    a.mass.add(b.mass);
    a.linear.add(b.linear);
    a.surprise.add(b.surprise);
    return a;
  });
}

__device__ inline const char* out_of_range(EntmaxLossName name) {
  switch (name) {
    case EntmaxLossName::kSparsemax:
      return "sparsemax_loss: target: expected a class index or ignore_index";
    case EntmaxLossName::kEntmax15:
      return "entmax15_loss: target: expected a class index or ignore_index";
    default:
      return "entmax_loss: target: expected a class index or ignore_index";
  }
}

// rows: the logits, and as output the gradient. y: the distributions, where there are some.
template <class A, int kRowThreads>
__global__ void __launch_bounds__(kBlockThreads<kRowThreads>, kBlocksAtLeast<double, kRowThreads>)
    entmax_loss_kernel(EntmaxLossParams p, PreparedRows<A> rows, PreparedRows<A> y, int kept_vectors) {
  TSE_DYNAMIC_SHARED(uint4, kept);
  int turn = 0;
  const int64_t count = row_count(p.map.rows), n = p.map.rows.n;
  const bool has_distribution = p.target == nullptr;
  for (int64_t index = first_row<kRowThreads>(); index < count; index += row_step<kRowThreads>()) {
    const auto x = rows.elements(index);
    const auto of_y = y.elements(index);
    const A* const of_p = static_cast<const A*>(p.map.output) + row_offset(p.map.output_rows, index);
    const int64_t p_stride = kRowThreads == 1 ? p.map.output_rows.stride_n : 1;
    const int64_t target = has_distribution    ? -1
                           : p.target_is_int32 ? int64_t(static_cast<const int32_t*>(p.target)[index])
                                               : static_cast<const int64_t*>(p.target)[index];
    const bool counts = has_distribution || target != p.ignore_index;  // the same in all threads of the row
    device_assert(!counts || has_distribution || (target >= 0 && target < n), out_of_range(p.name));
    const bool is_first = threadIdx.x % kRowThreads == 0;
    KeptRow<kRowThreads, A, 1, PreparedElements<A>> row(x, n, kept + threadIdx.x / kRowThreads * kept_vectors,
                                                        kept_vectors);

    A max = -infinity<A>();
    row.read(
        true, [&](int64_t, const Vec<A>& v) { max = fmax(max_of(v), max); }, [&](int64_t, A v) { max = fmax(v, max); });
    max = row_max<kRowThreads>(max, turn);
    const A r = has_distribution ? max : counts ? x[target] : A(0);
    const double alpha = p.map.alpha(index);
    const Surprise<A> w{A(alpha - 1)};
    const bool has_r = r > -infinity<A>();
    LossSums<A> sums, of_target;
    const auto add = [&](int64_t i, const A* v, auto elements) {
      constexpr int kCount = decltype(elements)::value;
      const auto logit = [&](int k) { return v[k]; };
      sums.template add<kCount>([&](int k) { return i + k == target ? A(0) : of_p[(i + k) * p_stride]; }, logit,
                                has_r ? r : A(0), w);
      if (has_distribution)
        of_target.template add<kCount>([&](int k) { return of_y[i + k]; }, logit, has_r ? r : A(0), w);
    };
    if (counts)
      row.read_again([&](int64_t i, const Vec<A>& v) { add(i, v.v, std::integral_constant<int, Vec<A>::kSize>()); },
                     [&](int64_t i, A v) { add(i, &v, std::integral_constant<int, 1>()); });
    sums = sum_of_row<kRowThreads>(sums, turn);
    if (has_distribution) of_target = sum_of_row<kRowThreads>(of_target, turn);

    const double others = wide(sums.mass), own = counts && !has_distribution ? double(of_p[target * p_stride]) : 0;
    if (is_first && p.row_loss != nullptr) {
      const double mass = others + own, linear = wide(sums.linear);
      double loss = 0;
      if (counts && !(mass > 0)) {
        loss = infinity<double>() - infinity<double>();  // of -inf alone, or with NaN
      } else if (counts && (!has_r || linear == infinity<double>())) {
        loss = infinity<double>();
      } else if (counts) {
        const double sum = wide(sums.surprise) + (own > 0 ? own * double(w(A(own))) : 0);
        // w + (x - r) is the same number on the support: what a rounding of Σ p is worth.
        const double level = linear + sum;
        loss = linear + sum / alpha - (mass - 1) * (level - 1 / alpha);
        if (has_distribution)
          loss += level * (wide(of_target.mass) - 1) - wide(of_target.linear) - wide(of_target.surprise) / alpha;
        if (loss < 0) loss = 0;  // NaN stays
      }
      static_cast<A*>(p.row_loss)[index] = A(loss);
    }
    if (p.map.grad_input == nullptr) continue;
    const double incoming = double(static_cast<const A*>(p.grad_output)[index * p.grad_output_stride]);
    const A g = A(incoming / p.divisor), of_own = A(-others * double(g));
    map_row<A>(row, rows.output(index, x), [&](int64_t i, A) {
      if (!counts) return A(0);
      if (i == target) return of_own;
      const A v = of_p[i * p_stride];
      return (has_distribution ? v - of_y[i] : v) * g;
    });
  }
}

template <class A>
void launch_rows_of(const EntmaxLossParams& p, cudaStream_t stream) {
  PreparedRowsParams x{}, y{};
  x.map = p.map;
  x.map.output_rows = p.map.grad_input == nullptr ? p.map.rows : p.map.grad_input_rows;
  x.map.output = p.map.grad_input;
  x.input_dtype = x.output_dtype = p.dtype;
  y = x;
  if (p.distribution != nullptr) {
    y.map.rows = p.distribution_rows;
    y.map.input = p.distribution;
  }
  const int64_t count = row_count(p.map.rows), n = p.map.rows.n;
  if (count == 0) return;
  const bool contiguous =
      p.map.rows.stride_n == 1 && p.map.output_rows.stride_n == 1 && x.map.output_rows.stride_n == 1;
  with_plan<A, /*kRegisters=*/false, /*kKeeps=*/false>(n, contiguous, [&](auto plan) {
    using Plan = decltype(plan);
    launch_rows<Plan, A>("entmax_loss_kernel", entmax_loss_kernel<A, Plan::kThreads>, count, n, stream, p,
                         PreparedRows<A>{x}, PreparedRows<A>{y});
  });
}

}  // namespace

void launch_entmax_loss(const EntmaxLossParams& p, cudaStream_t stream) {
  p.map.dtype == DType::kFloat64 ? launch_rows_of<double>(p, stream) : launch_rows_of<float>(p, stream);
}

}  // namespace tse
