// Entmax of any alpha, forward on CUDA. [CUDA]
//
// A row is read once from memory and walked over in each of Newton's steps, in shared memory. The t of the
// vectors' largest elements is an upper bound of the row's, or of alpha below 1 a lower one, and mostly a close one.
#include "common/cuda/map_rows.cuh"
#include "common/cuda/reduce.cuh"
#include "common/cuda/support_sum.cuh"
#include "entmax/any_alpha.cuh"
#include "entmax/entmax.h"
#include "softmax/softmax.h"
#include "sparsemax/sparsemax.h"

namespace tse {
namespace {

template <class A, int kRowThreads>
__global__ void __launch_bounds__(kBlockThreads<kRowThreads>, kBlocksAtLeast<double, kRowThreads>)
    any_alpha_fwd_kernel(PreparedRows<A> rows, float log_n, int kept_vectors) {
  TSE_DYNAMIC_SHARED(uint4, kept);
  int turn = 0;
  const int64_t count = row_count(rows.map().rows);
  for (int64_t index = first_row<kRowThreads>(); index < count; index += row_step<kRowThreads>()) {
    const auto x = rows.elements(index);
    KeptRow<kRowThreads, A, 1, PreparedElements<A>> row(x, rows.map().rows.n,
                                                        kept + threadIdx.x / kRowThreads * kept_vectors, kept_vectors);
    A max = -infinity<A>();
    row.read(
        true, [&](int64_t, const Vec<A>& v) { max = fmax(max_of(v), max); }, [&](int64_t, A v) { max = fmax(v, max); });
    max = row_max<kRowThreads>(max, turn);
    const AnyAlpha<A> alpha(rows.map().alpha(index), log_n);
    Shift<A> shift(alpha, max > -infinity<A>() ? max : A(0), rows.temperature(index));

    // Σ p and Σ p^(2 - alpha) at t; of the largest elements of the vectors, or of all.
    const auto sums = [&](double t, bool of_maxima) {
      shift.set(t);
      SupportSum<A, false> own;
      const auto add = [&](A v) {
        const auto term = shift.term(alpha, v);
        own.add(term.p, term.slope);
      };
      row.read_again(
          [&](int64_t, const Vec<A>& v) {
            if (of_maxima) {
              add(max_of(v));
            } else {
#pragma unroll 1
              for (int k = 0; k < Vec<A>::kSize; ++k) add(v.v[k]);
            }
            own.join_part();
          },
          [&](int64_t, A v) {
            add(v);
            own.join_part();
          });
      return row_reduce<kRowThreads>(own.template total<double>(), turn, Join());
    };
    double t = alpha.of_one();
#pragma unroll 1
    for (int all = kRowThreads > 1 ? 0 : 1; all < 2; ++all) {
      AlphaSearch<A> search(alpha, t);
      const double tolerance = all == 0                    ? 0.1
                               : std::is_same_v<A, double> ? 0x1p-34
                               : alpha.is_steep()          ? 0x1p-22
                                                           : 0x1p-17;
#pragma unroll 1
      for (int steps = 1; search.goes_on; ++steps) {
        const auto s = sums(search.t, all == 0);
        // Steps of a vertical curve may be tiny.
        search.step(alpha, s.sum, s.weight, alpha.is_steep() && steps % 4 == 0, tolerance);
      }
      t = search.t;
    }
    const auto thresholds = static_cast<RowThreshold<A>*>(rows.map().thresholds);
    shift.set(t);
    if (thresholds != nullptr) shift.set(t = shift.rounded_t());
    const double sum = alpha.is_steep() ? sums(t, false).sum : 1;
    const A scale = A(sum > 0 ? 1 / sum : 1);
    if (thresholds != nullptr) {
      if (threadIdx.x % kRowThreads == 0) thresholds[index] = {shift.max, shift.hi, shift.lo, scale, 0};
      continue;
    }
    map_row<A>(row, rows.output(index, x), [&](int64_t, A v) { return shift.term(alpha, v).p * scale; });
  }
}

template <class A>
void launch_fwd(const PreparedRows<A>& rows, cudaStream_t stream) {
  with_plan_of_rows</*kRegisters=*/false>(rows, [&](auto plan) {
    using Plan = decltype(plan);
    const Rows& p = rows.map().rows;
    launch_rows<Plan, A>("any_alpha_fwd_kernel", any_alpha_fwd_kernel<A, Plan::kThreads>, row_count(p), p.n, stream,
                         rows, float(std::log(double(p.n))));
  });
}

}  // namespace

// One alpha with a map of its own takes that. Softmax's kernel writes no thresholds: the losses of alpha 1 come here.
void launch_prepared_entmax_fwd(const PreparedRowsParams& p, cudaStream_t stream) {
  const double alpha = p.map.alpha.each == nullptr ? p.map.alpha.same : 0;
  if (alpha == 1 && p.map.thresholds == nullptr) return launch_prepared_softmax_fwd(p, stream);
  if (alpha == 1.5) return launch_prepared_entmax15_fwd(p, stream);
  if (alpha == 2) return launch_prepared_sparsemax_fwd(p, stream);
  with_prepared_rows(p, [&](const auto& rows) { launch_fwd(rows, stream); });
}

}  // namespace tse
