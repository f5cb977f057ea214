// Cross-entropy forward on CUDA. [CUDA]
//
// Each logit is read once: every thread keeps the sum of exp2(x · log2(e) - m) of its part with a running reference
// point m, an integer, so that sums are joined by powers of two. Then, for mean and sum, one block adds the rows'
// losses in double and in a fixed order. Log-probabilities are never stored.
#include "common/cuda/reduce.cuh"
#include "cross_entropy/coefficients.cuh"
#include "cross_entropy/cross_entropy.h"
#include "cross_entropy/exp_sum.cuh"

namespace tse {
namespace {

// The largest logit so far and where it is; NaN is larger, and the first of equals.
template <class A>
struct Best {
  A value = -infinity<A>();
  int64_t index = INT64_MAX;
};
template <class A>
__device__ inline Best<A> better(Best<A> a, Best<A> b) {
  const bool a_nan = a.value != a.value, b_nan = b.value != b.value;
  if (a_nan != b_nan) return a_nan ? a : b;
  if (!a_nan && a.value != b.value) return a.value > b.value ? a : b;
  return a.index < b.index ? a : b;
}

// -log2 p of a target with exponent t. One that has nearly all of the probability is compared with the sum in the sum's
// own arithmetic, so that a loss that must be 0 is 0.
template <class A>
__device__ inline A target_loss(const ExpSum<A>& s, A t) {
  const A term = exp2_of(t), loss = term > s.sum * A(0.25) ? log2(s.sum / term) : log2(s.sum) - t;
  return loss < 0 ? A(0) : loss;
}

// kGeneral: with softcap, coefficients of all classes, or predictions.
template <class T, int kRowThreads, bool kGeneral>
__global__ void __launch_bounds__(kBlockThreads<kRowThreads>) cross_entropy_fwd_kernel(CrossEntropyParams p) {
  using A = Acc<T>;
  const T* input = static_cast<const T*>(p.input);
  const int64_t rows = row_count(p.rows), n = p.rows.n, stride = p.rows.stride_n;
  const Logits<A> logits(p.transform);
  for (int64_t row = first_row<kRowThreads>(); row < rows; row += row_step<kRowThreads>()) {
    const T* x = input + row_offset(p.rows, row);
    const int64_t target = target_of(p, row);
    const bool counted = is_counted(p, target);
    ExpSum<A> s;
    Best<A> best;
    if (counted) {  // the same in all threads of the row; the logits of an ignored one are not even read
      device_assert(p.target == nullptr || (target >= 0 && target < n),
                    "cross_entropy: target: expected a class index or ignore_index");
      const Coefficients<T> coefficients(p, row);
      const auto walk = [&](int64_t i, const T* v, auto count) {
        constexpr int kCount = decltype(count)::value;
        A logit[kCount];
#pragma unroll
        for (int k = 0; k < kCount; ++k) {
          logit[k] = to_acc(v[k]);
          if constexpr (kGeneral) {
            if (p.predictions != nullptr) best = better(best, {logit[k], i + k});
            logit[k] = logits.cap(logit[k]);
          }
        }
        add<kCount>(s, logit, logits, [&](int k, A t) {
          if constexpr (kGeneral) {
            const A u = coefficients(i + k);
            s.linear += u * t;
            s.mass += u;
          }
        });
      };
      const auto scalar = [&](int64_t i, T v) { walk(i, &v, std::integral_constant<int, 1>{}); };
      const auto vector = [&](int64_t i, const Vec<T>& v) {
        walk(i, v.v, std::integral_constant<int, Vec<T>::kSize>{});
      };
      for_each_in_row<kRowThreads>(x, n, stride, vector, scalar);
      s = row_reduce<kRowThreads>(s, [](ExpSum<A> a, ExpSum<A> b) { return join(a, b); });
      if constexpr (kGeneral) {
        if (p.predictions != nullptr)
          best = row_reduce<kRowThreads>(best, [](Best<A> a, Best<A> b) { return better(a, b); });
      }
    }
    if (threadIdx.x % kRowThreads != 0) continue;
    A loss = 0, mass = 0;
    if (counted) {
      const A w = weight_of<A>(p, target);
      mass = w + s.mass;
      if (p.target != nullptr) loss = w * target_loss(s, logits.exponent(logits.cap(to_acc(x[target * stride])), s.m));
      if (p.row_mass != nullptr) loss += s.mass * log2(s.sum) - s.linear;
      loss *= kLn2<A>;
      if (p.z_loss_weight != 0 && p.reduction == Reduction::kNone) {
        const double lse = lse_of(s.m, s.sum);
        loss += A(p.z_loss_weight * lse * lse);
      }
    }
    static_cast<A*>(p.row_loss)[row] = loss;
    static_cast<A*>(p.row_m)[row] = s.m;
    static_cast<A*>(p.row_sum)[row] = s.sum;
    if (p.row_mass != nullptr) static_cast<A*>(p.row_mass)[row] = mass;
    if (p.predictions != nullptr) p.predictions[row] = counted ? best.index : p.ignore_index;
  }
}

struct Total {
  double loss;
  double z_loss;
  double weight;
  double counted;
};

constexpr int kReduceThreads = 1024;

template <class A>
__global__ void __launch_bounds__(kReduceThreads) cross_entropy_reduce_kernel(CrossEntropyParams p) {
  Total t = {0, 0, 0, 0};
  for (int64_t row = threadIdx.x; row < row_count(p.rows); row += kReduceThreads) {
    const int64_t target = target_of(p, row);
    if (!is_counted(p, target) || p.rows.n == 0) continue;  // of no classes the mean is NaN
    t.loss += double(static_cast<const A*>(p.row_loss)[row]);
    t.weight += p.target != nullptr && p.weight != nullptr ? double(static_cast<const A*>(p.weight)[target]) : 1.0;
    t.counted += 1;
    if (p.z_loss_weight != 0) {
      const double lse = lse_of(static_cast<const A*>(p.row_m)[row], static_cast<const A*>(p.row_sum)[row]);
      t.z_loss += p.z_loss_weight * lse * lse;
    }
  }
  t = row_reduce<kReduceThreads>(t, [](Total a, Total b) {
    return Total{a.loss + b.loss, a.z_loss + b.z_loss, a.weight + b.weight, a.counted + b.counted};
  });
  if (threadIdx.x != 0) return;
  p.total_weight[0] = t.weight;
  p.total_weight[1] = t.counted;
  if (p.loss == nullptr) return;
  if (p.reduction == Reduction::kMean) {
    t.loss /= t.weight;
    if (p.z_loss_weight != 0) t.z_loss /= t.counted;
  }
  *static_cast<A*>(p.loss) = A(t.loss + t.z_loss);
  if (p.z_loss != nullptr) *static_cast<A*>(p.z_loss) = A(t.z_loss);
}

template <class T, int kRowThreads>
void launch_rows(const CrossEntropyParams& p, cudaStream_t stream) {
  const bool general = p.is_general() || p.predictions != nullptr;
  launch("cross_entropy_fwd_kernel",
         general ? cross_entropy_fwd_kernel<T, kRowThreads, true> : cross_entropy_fwd_kernel<T, kRowThreads, false>,
         grid_for(row_count(p.rows), kRowsPerBlock<kRowThreads>), kBlockThreads<kRowThreads>, 0, stream, p);
}

template <class T>
void launch_fwd(const CrossEntropyParams& p, cudaStream_t stream) {
  if (row_count(p.rows) != 0) {
    if (p.rows.stride_n != 1) launch_rows<T, 1>(p, stream);
    else if (p.rows.n <= 1024) launch_rows<T, 32>(p, stream);
    else if (p.rows.n <= 8192) launch_rows<T, 128>(p, stream);
    else launch_rows<T, 512>(p, stream);
  }
  if (p.reduction != Reduction::kNone || p.predictions != nullptr)
    launch("cross_entropy_reduce_kernel", cross_entropy_reduce_kernel<Acc<T>>, 1, kReduceThreads, 0, stream, p);
}

}  // namespace

void launch_cross_entropy_fwd(const CrossEntropyParams& p, cudaStream_t stream) {
  TSE_LAUNCH_BY_DTYPE(p, launch_fwd, p, stream)
}

}  // namespace tse
