// Cross-entropy backward on CUDA (cross_entropy.h). [CUDA]
// Each logit is read once and its gradient written once; nothing where forward has written it for what comes in.
#include "cross_entropy/row_gradient.cuh"

namespace tse {
namespace {

// The number that comes into a mean or sum. The stream remembers it for its next forward.
template <class A>
__device__ inline double observe_grad_output(const CrossEntropyParams& p, CrossEntropyState* state) {
  const double grad = static_cast<const A*>(p.grad_output)[0];
  if (state != nullptr && blockIdx.x == 0 && threadIdx.x == 0) {
    const int which = int(p.reduction);
    state->repeated[which] = state->last[which] == grad;
    state->last[which] = grad;
  }
  return grad;
}

template <class T, int kRowThreads, int kVectors, bool kGeneral>
__global__ void __launch_bounds__(kBlockThreads<kRowThreads>, kBlocksAtLeast<T, kRowThreads, kVectors>)
    cross_entropy_bwd_kernel(CrossEntropyParams p, Logits<Acc<T>> logits, CrossEntropyState* state) {
  using A = Acc<T>;
  if (p.compare_guess && observe_grad_output<A>(p, state) == *p.guess) return;
  const A* grad_output = static_cast<const A*>(p.grad_output);
  TSE_SHARED(RowGradOutput, shared_grad, 1);
  if (threadIdx.x == 0) shared_grad[0] = row_grad_output<A>(p, grad_output[0], p.total_weight);
  __syncthreads();
  int turn = 0;
  const int64_t rows = row_count(p.rows), n = p.rows.n;
  int64_t row = first_row<kRowThreads>(), next_target = row < rows ? target_of(p, row) : 0;
  for (; row < rows; row += row_step<kRowThreads>()) {
    const T* x = static_cast<const T*>(p.input) + row_offset(p.rows, row);
    T* g = static_cast<T*>(p.grad_input) + row_offset(p.grad_rows, row);
    const int64_t target = next_target, next = row + row_step<kRowThreads>();
    if (next < rows) next_target = target_of(p, next);
    if (!is_counted(p, target)) {
      zero_row<kRowThreads>(g, p.grad_rows.stride_n, n);
      continue;
    }
    Row<T, kRowThreads, kVectors, kLogitLoads<kRowThreads, kGeneral>> logits_of_row({x, p.rows.stride_n}, n);
    logits_of_row.load();
    const RowStatistics<A> s = {static_cast<const A*>(p.row_m)[row], static_cast<const A*>(p.row_sum)[row],
                                static_cast<const A*>(p.row_others)[row],
                                p.row_mass == nullptr ? A(0) : static_cast<const A*>(p.row_mass)[row]};
    const RowGradOutput grad = p.grad_output_stride == 0
                                   ? shared_grad[0]
                                   : row_grad_output<A>(p, grad_output[row * p.grad_output_stride], p.total_weight);
    const auto own = own_class<T, kRowThreads, kGeneral>(p, row, target, turn);
    const A own_logit = own.index < 0 ? A(0) : to_acc(x[own.index * p.rows.stride_n]);
    write_gradient(StoredOutput<T>(g, p.grad_rows.stride_n, x), logits_of_row, own, own_logit,
                   RowGradient<T, kRowThreads, kGeneral>(p, logits, row, s, own, grad));
  }
}

// Of a gradient in the logits' place, which are no longer there to begin anew.
template <class T, int kRowThreads>
__global__ void __launch_bounds__(kBlockThreads<kRowThreads>, kBlocksAtLeast<T, kRowThreads>)
    cross_entropy_rescale_kernel(CrossEntropyParams p, CrossEntropyState* state) {
  using A = Acc<T>;
  const double ratio = observe_grad_output<A>(p, state) / *p.guess;
  if (ratio == 1) return;
  const int64_t rows = row_count(p.grad_rows), n = p.grad_rows.n, stride = p.grad_rows.stride_n;
  for (int64_t row = first_row<kRowThreads>(); row < rows; row += row_step<kRowThreads>()) {
    T* g = static_cast<T*>(p.grad_input) + row_offset(p.grad_rows, row);
    map_row<T>(KeptRow<kRowThreads, T>({g, stride}, n), StoredOutput<T>(g, stride, g),
               [&](int64_t, A v) { return v * A(ratio); });
  }
}

template <class T, bool kGeneral>
void launch_bwd_of(const CrossEntropyParams& p, cudaStream_t stream) {
  with_plan_of<T, kGeneral>(p, [&](auto plan) {
    constexpr int kRowThreads = decltype(plan)::kThreads, kThreads = kBlockThreads<kRowThreads>;
    const auto kernel = cross_entropy_bwd_kernel<T, kRowThreads, decltype(plan)::kVectors, kGeneral>;
    launch("cross_entropy_bwd_kernel", kernel,
           grid_for(row_count(p.rows), kRowsPerBlock<kRowThreads>, kernel, kThreads, 0), kThreads, 0, stream, p,
           Logits<Acc<T>>(p.transform), p.compare_guess ? cross_entropy_state(stream) : nullptr);
  });
}

template <class T>
void launch_bwd(const CrossEntropyParams& p, cudaStream_t stream) {
  if (row_count(p.rows) == 0) return;
  if (p.is_general()) launch_bwd_of<T, true>(p, stream);
  else launch_bwd_of<T, false>(p, stream);
}

template <class T>
void launch_rescale(const CrossEntropyParams& p, cudaStream_t stream) {
  if (row_count(p.grad_rows) == 0) return;
  with_plan_of<T, true>(p, [&](auto plan) {
    constexpr int kRowThreads = decltype(plan)::kThreads, kThreads = kBlockThreads<kRowThreads>;
    const auto kernel = cross_entropy_rescale_kernel<T, kRowThreads>;
    launch("cross_entropy_rescale_kernel", kernel,
           grid_for(row_count(p.grad_rows), kRowsPerBlock<kRowThreads>, kernel, kThreads, 0), kThreads, 0, stream, p,
           cross_entropy_state(stream));
  });
}

}  // namespace

void launch_cross_entropy_bwd(const CrossEntropyParams& p, cudaStream_t stream) {
  TSE_BY_DTYPE(p.dtype, launch_bwd, p, stream)
}
void launch_cross_entropy_rescale(const CrossEntropyParams& p, cudaStream_t stream) {
  TSE_BY_DTYPE(p.dtype, launch_rescale, p, stream)
}

}  // namespace tse
