// Softmax and log-softmax forward on CUDA. [CUDA]
//
// A row is read once from memory, into registers or shared memory; its sum is that of cross-entropy, made relative to
// the largest logit. Each element takes two exponentials, one of them for the result.
#include "common/cuda/exp_sum.cuh"
#include "common/cuda/map_rows.cuh"
#include "softmax/softmax.h"

namespace tse {
namespace {

// `same`: the exponents of rows without a slope of their own.
template <class Rows, int kRowThreads, int kVectors>
__global__ void __launch_bounds__(kBlockThreads<kRowThreads>, kBlocksAtLeast<typename Rows::T, kRowThreads, kVectors>)
    softmax_fwd_kernel(Rows rows, Logits<typename Rows::A> same, bool is_log, int kept_vectors) {
  using T = typename Rows::T;
  using A = typename Rows::A;
  TSE_DYNAMIC_SHARED(uint4, kept);
  int turn = 0;
  const int64_t count = row_count(rows.map().rows);
  for (int64_t index = first_row<kRowThreads>(); index < count; index += row_step<kRowThreads>()) {
    Logits<A> logits = same;
    if constexpr (Rows::kHasSlope) logits = Logits<A>(LogitTransform{rows.temperature(index)});
    const auto x = rows.elements(index);
    Row<T, kRowThreads, kVectors, 2, typename Rows::Elements> row(
        x, rows.map().rows.n, kept + threadIdx.x / kRowThreads * kept_vectors, kept_vectors);
    row.load();
    ExpSum<A, false> s;
    A max = -infinity<A>();
    if constexpr (kVectors > 0) {
      maxima(row, [&](A of_vector) { max = fmax(of_vector, max); });
      max = row_max<kRowThreads>(max, turn);
      s.set(max, logits.margin);
    }
    const auto add_to_sum = [&](auto& z) {
      constexpr int kCount = sizeof(z) / sizeof(A);
      A of_these = -infinity<A>();
      if constexpr (kVectors == 0) {
        of_these = max_of(z);
        max = fmax(of_these, max);
      }
      add<kCount>(s, z, of_these, -1, logits, 0);
    };
    row.read(
        true,
        [&](int64_t, const Vec<T>& v) {
          A z[Vec<T>::kSize];
#pragma unroll
          for (int k = 0; k < Vec<T>::kSize; ++k) z[k] = to_acc(v.v[k]);
          add_to_sum(z);
        },
        [&](int64_t, T v) {
          A z[1] = {to_acc(v)};
          add_to_sum(z);
        });
    s = sum_of_threads<kRowThreads>(s, turn, logits);
    if constexpr (kVectors == 0) {
      max = row_max<kRowThreads>(max, turn);
      if (s.m() < max) s.raise_reference(max, logits);
    }
    const A sum = s.sums.sum.value();  // 0: of a row of -inf alone
    const auto y = rows.output(index, x);
    if (is_log) {
      const A log_sum = sum == 0 ? A(0) : log(sum);
      map_row<T>(row, y, [&](int64_t, A v) { return -logits.below(v, s.half) - log_sum; });
    } else {
      const A scale = sum == 0 ? A(0) : 1 / sum;
      map_row<T>(row, y, [&](int64_t, A v) { return logits.term(v, s.half) * scale; });
    }
  }
}

template <class Rows>
void launch_fwd(const Rows& rows, bool is_log, cudaStream_t stream) {
  using T = typename Rows::T;
  with_plan_of_rows(rows, [&](auto plan) {
    using Plan = decltype(plan);
    const auto& p = rows.map().rows;
    launch_rows<Plan, T>("softmax_fwd_kernel", softmax_fwd_kernel<Rows, Plan::kThreads, Plan::kVectors>, row_count(p),
                         p.n, stream, rows, Logits<Acc<T>>(LogitTransform{}), is_log);
  });
}
template <class T>
void launch_stored(const RowMapParams& p, bool is_log, cudaStream_t stream) {
  launch_fwd(StoredRows<T>{p}, is_log, stream);
}

}  // namespace

void launch_softmax_fwd(const RowMapParams& p, cudaStream_t stream) {
  TSE_BY_DTYPE(p.dtype, launch_stored, p, /*is_log=*/false, stream)
}
void launch_log_softmax_fwd(const RowMapParams& p, cudaStream_t stream) {
  TSE_BY_DTYPE(p.dtype, launch_stored, p, /*is_log=*/true, stream)
}
void launch_prepared_softmax_fwd(const PreparedRowsParams& p, cudaStream_t stream) {
  with_prepared_rows(p, [&](const auto& rows) { launch_fwd(rows, /*is_log=*/false, stream); });
}
void launch_prepared_log_softmax_fwd(const PreparedRowsParams& p, cudaStream_t stream) {
  with_prepared_rows(p, [&](const auto& rows) { launch_fwd(rows, /*is_log=*/true, stream); });
}

}  // namespace tse
