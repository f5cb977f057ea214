// Sparsemax forward on CUDA; sparsemax_cpu-inl.h tells the mathematics. [CUDA]
//
// Short rows stay in registers. The threshold of the largest elements of their vectors is a lower bound of the row's,
// mostly a close one: two or three of Newton's steps over all elements are left. Of a longer row, which a block has,
// every 16-byte vector is read once and compared with a lower bound that is known from the row's first vectors: the
// largest element minus 1. What lies below is dead: zeros are all that is left to do. What is alive is kept in shared
// memory as it was stored; Newton's steps, the first of them over the threads' largest elements, and the result need
// nothing else. Vectors that do not fit there are read again, mostly a few, and from L2. So memory is passed once in
// each direction, and the result is exact for any n.
#include "common/cuda/reduce.cuh"
#include "common/cuda/row.cuh"
#include "sparsemax/sparsemax.h"
#include "sparsemax/support.cuh"

namespace tse {
namespace {

// Rounded down: a bound may let an element too many live, not one too few.
__device__ inline float add_down(float a, float b) { return __fadd_rd(a, b); }
__device__ inline double add_down(double a, double b) { return __dadd_rd(a, b); }

template <class A>
__device__ inline A reference_point(A max) {
  return max == -infinity<A>() ? A(0) : max;
}

template <class T, class A>
__device__ inline T probability(A above) {
  return from_acc<T>(above <= 0 ? A(0) : above);  // NaN stays
}

// ---- rows that are walked in each step: in registers, or of few threads
// -----------------------------------------------

// Newton's steps over the z for which each(add) calls add(z, whether a vector ends), from tau on. Sums in A are of few
// elements, in which rounding cannot lead the steps astray (support.cuh).
template <int kRowThreads, class S, class A, class Each>
__device__ inline void newton(const Each& each, Threshold<A>& tau, int& turn) {
  const auto sum = [&] {
    SupportSum<A> own;
    each([&](A z, bool ends) {
      const A above = tau.above(z);
      if (!(above <= 0)) own.add(above);
      if (ends) own.join_part();
    });
    return row_reduce<kRowThreads>(own.template total<S>(), turn,
                                   [](const auto& a, const auto& b) { return join(a, b); });
  };
  if constexpr (std::is_same_v<S, float>) {
    for (bool goes_on = true; goes_on;) {
      const SupportTotal<A> s = sum();
      goes_on = s.count > 0 && fabs(s.sum - 1) > kSumTolerance<A>;  // count 0: a row of -inf alone
      const A step = tau.rest + (s.sum - 1) / A(s.count > 1 ? s.count : 1), t = tau.t + step;
      tau = {t, step - (t - tau.t)};
    }
  } else {
    ThresholdSearch<A> search{tau};
    while (search.goes_on) {
      search.step(sum());
      tau = search;
    }
  }
}

template <class T, int kRowThreads, int kVectors>
__global__ void __launch_bounds__(kBlockThreads<kRowThreads>, kBlocksAtLeast<T, kRowThreads, kVectors>)
    sparsemax_fwd_kernel(RowMapParams p) {
  using A = Acc<T>;
  using S = SumOf<T, kRowThreads, kVectors>;
  constexpr int kSize = Vec<T>::kSize;
  int turn = 0;
  const int64_t rows = row_count(p.rows);
  for (int64_t index = first_row<kRowThreads>(); index < rows; index += row_step<kRowThreads>()) {
    const T* const x = static_cast<const T*>(p.input) + row_offset(p.rows, index);
    T* const y = static_cast<T*>(p.output) + row_offset(p.output_rows, index);
    Row<T, kRowThreads, kVectors, 2> row(x, p.rows.n, p.rows.stride_n);
    row.load();
    A max = -infinity<A>();
    maxima(row, [&](A of_vector) { max = fmax(of_vector, max); });
    const A m = reference_point(row_reduce<kRowThreads>(max, turn, [](A a, A b) { return fmax(a, b); }));
    Threshold<A> tau;
    if constexpr (kRowThreads > 1)
      newton<kRowThreads, S>([&](const auto& add) { maxima(row, [&](A of_vector) { add(of_vector - m, true); }); }, tau,
                             turn);
    newton<kRowThreads, S>(
        [&](const auto& add) {
          row.read(
              true,
              [&](int64_t, const Vec<T>& v) {
#pragma unroll
                for (int k = 0; k < kSize; ++k) add(to_acc(v.v[k]) - m, k == kSize - 1);
              },
              [&](int64_t, T v) { add(to_acc(v) - m, true); });
        },
        tau, turn);
    map_row(row, y, p.output_rows.stride_n, [&](int64_t, A v) { return probability<A>(tau.above(v - m)); });
  }
}

// ---- a row of a block ---------------------------------------------------------------------------------------------

// One bit for each vector that a thread owns, or for 2, 4, … of them where it owns more than 64.
struct LiveVectors {
  uint64_t bits = 0;
  int shift = 0;
  __device__ explicit LiveVectors(int owned) {
    while (owned > 64 << shift) ++shift;
  }
  __device__ void add(int i) { bits |= uint64_t(1) << (i >> shift); }
  __device__ bool has(int i) const { return bits >> (i >> shift) & 1; }
};

template <class T>
__device__ inline Vec<T> splat_vec(T value) {
  Vec<T> result;
#pragma unroll
  for (int k = 0; k < Vec<T>::kSize; ++k) result.v[k] = value;
  return result;
}

// Vectors under way of a thread. Four of eight elements would need more registers than kResidentThreads have.
template <class T>
constexpr int kBatch = sizeof(T) == 2 ? 3 : 4;

template <class T, int kRowThreads>
__global__ void __launch_bounds__(kRowThreads, kBlocksAtLeast<T, kRowThreads>)
    sparsemax_fwd_block_kernel(RowMapParams p, int kept) {
  using A = Acc<T>;
  constexpr int kSize = Vec<T>::kSize;
  TSE_DYNAMIC_SHARED(Vec<T>, cache);  // each thread reads back only what it wrote
  TSE_SHARED(ThresholdSearch<A>, search, 1);
  int turn = 0;
  const int64_t rows = row_count(p.rows);
  const Vec<T> low = splat_vec(from_acc<T>(-infinity<A>()));
  const auto max_of_row = [&](A max) {
    return row_reduce<kRowThreads>(max, turn, [](A a, A b) { return fmax(a, b); });
  };
  for (int64_t index = blockIdx.x; index < rows; index += gridDim.x) {
    const T* const x = static_cast<const T*>(p.input) + row_offset(p.rows, index);
    T* const y = static_cast<T*>(p.output) + row_offset(p.output_rows, index);
    const RowShape<kRowThreads, T> shape(x, p.rows.n);
    LiveVectors live((shape.vectors + kRowThreads - 1) / kRowThreads);

    Vec<T> batch[kBatch<T>];
    const auto load_batch = [&](int v) {
#pragma unroll
      for (int j = 0; j < kBatch<T>; ++j)
        batch[j] = v + j * kRowThreads < shape.vectors ? load_vec(x + shape.first(v + j * kRowThreads)) : low;
    };
    load_batch(threadIdx.x);
    const int64_t loose_at = shape.loose(int(threadIdx.x));  // there are less than 16
    const A loose = loose_at >= 0 ? to_acc(x[loose_at]) : -infinity<A>();
    A max = fmax(loose, -infinity<A>());
#pragma unroll
    for (int j = 0; j < kBatch<T>; ++j) max = fmax(max_of(batch[j]), max);
    const A first_max = max_of_row(max);
    const A bound =
        first_max < infinity<A>() ? add_down(first_max, A(-1)) : first_max - first_max;  // NaN: none is dead
    for (int i = 0, v = threadIdx.x; v < shape.vectors; i += kBatch<T>) {
#pragma unroll
      for (int j = 0; j < kBatch<T>; ++j, v += kRowThreads) {
        bool above = false;
#pragma unroll
        for (int k = 0; k < kSize; ++k) above |= !(to_acc(batch[j].v[k]) <= bound);
        if (v < kept && (above || live.shift != 0)) cache[v] = batch[j];
        if (!above || v >= shape.vectors) continue;
        live.add(i + j);
        max = fmax(max_of(batch[j]), max);
      }
      load_batch(v);
    }
    const A m = reference_point(max_of_row(max));
    const auto load = [&](int v) { return v < kept ? cache[v] : load_vec(x + shape.first(v)); };

    // Newton's steps from tau on; sum(): the terms of this thread.
    Threshold<A> tau;
    const auto solve = [&](const auto& sum, const auto& after) {
      for (bool begins = true, goes_on = true; goes_on; begins = false) {
        const auto s = row_reduce<kRowThreads>(sum(), turn, [](const auto& a, const auto& b) { return join(a, b); });
        after(s.sum);
        if (threadIdx.x == 0) {
          if (begins) search[0] = ThresholdSearch<A>{tau};
          search[0].step(s);
        }
        __syncthreads();
        tau = search[0];
        goes_on = search[0].goes_on;
      }
    };
    solve(
        [&] {
          const A above = tau.above(max - m);
          return above <= 0 ? SupportTotal<double>{0, 0} : SupportTotal<double>{double(above), 1};
        },
        [](double) {});
    uint64_t above_bits = 0;
    solve(
        [&] {
          SupportSum<A> own;
          const auto add = [&](A z) {
            const A above = tau.above(z - m);
            if (!(above <= 0)) own.add(above);
          };
          above_bits = 0;
#pragma unroll 1
          for (uint64_t bits = live.bits; bits != 0; bits &= bits - 1) {
            const int bit = __ffsll(static_cast<long long>(bits)) - 1;
            const int64_t before = own.count();
#pragma unroll 1
            for (int i = bit << live.shift; i < (bit + 1) << live.shift; ++i) {
              const int v = threadIdx.x + i * kRowThreads;
              if (v >= shape.vectors) break;
              const Vec<T> e = load(v);
#pragma unroll
              for (int k = 0; k < kSize; ++k) add(to_acc(e.v[k]));
              own.join_part();
            }
            if (own.count() != before) above_bits |= uint64_t(1) << bit;
          }
          add(loose);
          return own.total();
        },
        [&](double sum) {
          if (sum >= 1) live.bits = above_bits;  // what is below a lower bound of the threshold
        });

    const bool alike = is_aligned_like<T>(x, y);
    const Vec<T> dead = splat_vec(from_acc<T>(tau.t != tau.t ? tau.t : A(0)));
    for (int i = 0, v = threadIdx.x; v < shape.vectors; ++i, v += kRowThreads) {
      Vec<T> e = dead;
      if (live.has(i)) {
        e = load(v);
#pragma unroll
        for (int k = 0; k < kSize; ++k) e.v[k] = probability<T>(tau.above(to_acc(e.v[k]) - m));
      }
      shape.put(y, alike, shape.first(v), e);
    }
    if (loose_at >= 0) y[loose_at] = probability<T>(tau.above(loose - m));
  }
}

template <class T>
void launch_fwd(const RowMapParams& p, cudaStream_t stream) {
  const int64_t rows = row_count(p.rows), n = p.rows.n;
  if (rows == 0) return;
  with_plan<T, true>(n, p.rows.stride_n == 1 && p.output_rows.stride_n == 1, [&](auto plan) {
    constexpr int kRowThreads = decltype(plan)::kThreads, kVectors = decltype(plan)::kVectors;
    constexpr int kThreads = kBlockThreads<kRowThreads>;
    if constexpr (kVectors > 0 || kRowThreads <= 32) {
      const auto kernel = sparsemax_fwd_kernel<T, kRowThreads, kVectors>;
      launch("sparsemax_fwd_kernel", kernel, grid_for(rows, kRowsPerBlock<kRowThreads>, kernel, kThreads, 0), kThreads,
             0, stream, p);
    } else {
      const int kept = kept_vectors(device_limits(), n * sizeof(T) / 16, 1);
      const auto kernel = sparsemax_fwd_block_kernel<T, kRowThreads>;
      launch("sparsemax_fwd_block_kernel", kernel, grid_for(rows, 1, kernel, kThreads, kept * sizeof(Vec<T>)), kThreads,
             kept * sizeof(Vec<T>), stream, p, kept);
    }
  });
}

}  // namespace

void launch_sparsemax_fwd(const RowMapParams& p, cudaStream_t stream) { TSE_BY_DTYPE(p.dtype, launch_fwd, p, stream) }

}  // namespace tse
