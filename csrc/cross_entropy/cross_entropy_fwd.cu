// Cross-entropy forward on CUDA. [CUDA]
//
// Each logit is read once: every thread keeps the sum of exp2(x · log2(e) - m) of its part with a running reference
// point m, an integer, so that sums are joined by powers of two. Then, for mean and sum, one block adds the rows'
// losses in double and in a fixed order. Log-probabilities are never stored.
#include "common/cuda/reduce.cuh"
#include "cross_entropy/cross_entropy.h"
#include "cross_entropy/exp_sum.cuh"

namespace tse {
namespace {

template <class T, int kRowThreads>
__global__ void __launch_bounds__(kBlockThreads<kRowThreads>) cross_entropy_fwd_kernel(CrossEntropyParams p) {
  using A = Acc<T>;
  const T* input = static_cast<const T*>(p.input);
  const int64_t rows = row_count(p.rows), n = p.rows.n, stride = p.rows.stride_n;
  for (int64_t row = first_row<kRowThreads>(); row < rows; row += row_step<kRowThreads>()) {
    const T* x = input + row_offset(p.rows, row);
    const int64_t target = target_of(p, row);
    const bool counted = target != p.ignore_index;
    ExpSum<A> s;
    if (counted) {  // the same in all threads of the row; the logits of an ignored one are not even read
      device_assert(target >= 0 && target < n, "cross_entropy: target: expected a class index or ignore_index");
      const auto scalar = [&](int64_t, T v) { add<1>(s, &v); };
      const auto vector = [&](int64_t, const Vec<T>& v) { add<Vec<T>::kSize>(s, v.v); };
      for_each_in_row<kRowThreads>(x, n, stride, vector, scalar);
      s = row_reduce<kRowThreads>(s, [](ExpSum<A> a, ExpSum<A> b) { return join(a, b); });
    }
    if (threadIdx.x % kRowThreads != 0) continue;
    static_cast<A*>(p.row_loss)[row] = counted ? loss_of(s, A(to_acc(x[target * stride]))) : A(0);
    static_cast<A*>(p.row_m)[row] = s.m;
    static_cast<A*>(p.row_sum)[row] = s.sum;
  }
}

struct Total {
  double loss;
  double weight;
};

constexpr int kReduceThreads = 1024;

template <class A>
__global__ void __launch_bounds__(kReduceThreads) cross_entropy_reduce_kernel(CrossEntropyParams p) {
  Total t = {0, 0};
  for (int64_t row = threadIdx.x; row < row_count(p.rows); row += kReduceThreads) {
    t.loss += double(static_cast<const A*>(p.row_loss)[row]);
    t.weight += target_of(p, row) != p.ignore_index;
  }
  t = row_reduce<kReduceThreads>(t, [](Total a, Total b) { return Total{a.loss + b.loss, a.weight + b.weight}; });
  if (threadIdx.x != 0) return;
  *p.total_weight = t.weight;
  *static_cast<A*>(p.loss) = A(p.reduction == Reduction::kMean ? t.loss / t.weight : t.loss);
}

template <class T, int kRowThreads>
void launch_rows(const CrossEntropyParams& p, cudaStream_t stream) {
  launch("cross_entropy_fwd_kernel", cross_entropy_fwd_kernel<T, kRowThreads>,
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
  if (p.reduction != Reduction::kNone)
    launch("cross_entropy_reduce_kernel", cross_entropy_reduce_kernel<Acc<T>>, 1, kReduceThreads, 0, stream, p);
}

}  // namespace

void launch_cross_entropy_fwd(const CrossEntropyParams& p, cudaStream_t stream) {
  TSE_LAUNCH_BY_DTYPE(p, launch_fwd, p, stream)
}

}  // namespace tse
