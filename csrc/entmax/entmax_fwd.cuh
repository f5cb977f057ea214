// Forward of sparsemax and entmax on CUDA, of the policies in threshold.cuh. [CUDA]
//
// Short rows stay in registers. The threshold of the largest elements of their vectors is a lower bound of the row's,
// mostly a close one: a few of Newton's steps over all elements are left. Of a longer row, which a block has, every
// 16-byte vector is read once and compared with a lower bound that is known from the row's first vectors: the largest
// element minus 1 / (alpha - 1). What lies below is dead: zeros are all that is left to do. What is alive is kept
// in shared memory as it was stored; Newton's steps, the first of them over the threads' largest elements, and the
// result need nothing else. Vectors that do not fit there are read again, mostly a few, and from L2. So memory is
// passed once in each direction, whatever n.
#pragma once
#include "common/cuda/map_rows.cuh"
#include "common/cuda/reduce.cuh"
#include "entmax/entmax.h"
#include "entmax/threshold.cuh"

namespace tse {

// Rounded down: a bound may let an element too many live, not one too few.
__device__ inline float add_down(float a, float b) { return __fadd_rd(a, b); }
__device__ inline double add_down(double a, double b) { return __dadd_rd(a, b); }

template <class A>
__device__ inline A reference_point(A max) {
  return max == -infinity<A>() ? A(0) : max;
}

// The policy of a row.
template <class Rows, class Policy>
__device__ inline auto policy_of(const Rows& rows, const Policy& policy, int64_t index) {
  if constexpr (Rows::kHasSlope) return Sloped<typename Rows::A, Policy>(policy, rows.temperature(index));
  else return policy;
}

template <class A, class Policy>
__device__ inline A probability(const Policy& policy, A above) {
  return above <= 0 ? A(0) : policy.probability(above);  // NaN stays
}

// A term of the sums; NaN is one, so that it spreads.
template <class A, class Policy>
__device__ inline void add_term(SupportSum<A, Policy::kCounts>& own, const Policy& policy, A above) {
  if (!(above <= 0)) own.add(policy.probability(above), policy.slope(above));
}

// Writes the threshold, and returns true, if a loss asks for it instead of the probabilities.
template <int kRowThreads, class Rows, class A>
__device__ inline bool put_threshold(const Rows& rows, int64_t index, A m, const Threshold<A>& tau) {
  if constexpr (!Rows::kHasSlope) return false;
  const auto thresholds = static_cast<RowThreshold<A>*>(rows.map().thresholds);
  if (thresholds == nullptr) return false;
  if (threadIdx.x % kRowThreads == 0) thresholds[index] = {m, -tau.t, -tau.rest, 1, 0};
  return true;
}

// ---- rows that are walked in each step: in registers, or of few threads --------------------------------------------

// Newton's steps over the z for which each(add) calls add(z, whether a vector ends), from tau on. Sums in A are of few
// elements, in which rounding cannot lead the steps astray (threshold.cuh).
template <int kRowThreads, class S, class A, class Policy, class Each>
__device__ inline void newton(const Policy& policy, const Each& each, Threshold<A>& tau, int& turn) {
  const auto sum = [&] {
    SupportSum<A, Policy::kCounts> own;
    each([&](A z, bool ends) {
      add_term(own, policy, tau.above(z));
      if (ends) own.join_part();
    });
    return row_reduce<kRowThreads>(own.template total<S>(), turn, Join());
  };
  if constexpr (std::is_same_v<S, float>) {
    for (bool goes_on = true; goes_on;) {
      const auto s = sum();
      goes_on = s.weight > 0 && fabs(s.sum - 1) > kSumTolerance<A>;  // as ThresholdSearch
      const A step = tau.rest + newton_step(s, policy.scale), t = tau.t + step;
      tau = {t, step - (t - tau.t)};
    }
  } else {
    ThresholdSearch<A> search{tau};
    while (search.goes_on) {
      search.step(sum(), policy.scale);
      tau = search;
    }
  }
}

template <class Rows, int kRowThreads, int kVectors, class Policy>
__global__ void __launch_bounds__(kBlockThreads<kRowThreads>, kBlocksAtLeast<typename Rows::T, kRowThreads, kVectors>)
    entmax_fwd_kernel(Rows rows, Policy policy_of_all) {
  using T = typename Rows::T;
  using A = typename Rows::A;
  using S = SumOf<T, kRowThreads, kVectors>;
  constexpr int kSize = Vec<T>::kSize;
  int turn = 0;
  const int64_t count = row_count(rows.map().rows);
  for (int64_t index = first_row<kRowThreads>(); index < count; index += row_step<kRowThreads>()) {
    const auto policy = policy_of(rows, policy_of_all, index);
    const auto x = rows.elements(index);
    Row<T, kRowThreads, kVectors, 2, typename Rows::Elements> row(x, rows.map().rows.n);
    row.load();
    A max = -infinity<A>();
    maxima(row, [&](A of_vector) { max = fmax(of_vector, max); });
    const A m = reference_point(row_max<kRowThreads>(max, turn));
    Threshold<A> tau;
    if constexpr (kRowThreads > 1)
      newton<kRowThreads, S>(
          policy, [&](const auto& add) { maxima(row, [&](A of_vector) { add(policy.z(of_vector, m), true); }); }, tau,
          turn);
    newton<kRowThreads, S>(
        policy,
        [&](const auto& add) {
          row.read(
              true,
              [&](int64_t, const Vec<T>& v) {
#pragma unroll
                for (int k = 0; k < kSize; ++k) add(policy.z(to_acc(v.v[k]), m), k == kSize - 1);
              },
              [&](int64_t, T v) { add(policy.z(to_acc(v), m), true); });
        },
        tau, turn);
    if (put_threshold<kRowThreads>(rows, index, m, tau)) continue;
    map_row<T>(row, rows.output(index, x),
               [&](int64_t, A v) { return probability(policy, tau.above(policy.z(v, m))); });
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

// A row of which a thread keeps the vectors that may be in the support.
template <class T, int kRowThreads, class Elements, class Policy>
struct LiveRow : RowShape<kRowThreads, T> {
  using A = Acc<T>;
  static constexpr int kSize = Vec<T>::kSize;
  Elements x;
  Vec<T>* cache;  // each thread reads back only what it wrote
  int kept;
  Policy policy;
  LiveVectors live;
  uint64_t above = 0;  // of `live`, those with an element above the threshold of the last sum
  int64_t loose_at = this->loose(int(threadIdx.x));  // there are less than 16
  A loose_value = loose_at >= 0 ? to_acc(x[loose_at]) : -infinity<A>(), max = fmax(loose_value, -infinity<A>()), m = 0;

  __device__ LiveRow(const Elements& x, int64_t n, Vec<T>* cache, int kept, const Policy& policy)
      : RowShape<kRowThreads, T>(x, n),
        x(x),
        cache(cache),
        kept(kept),
        policy(policy),
        live((this->vectors + kRowThreads - 1) / kRowThreads) {}

  __device__ Vec<T> load(int v) const {
    if (v < kept) return cache[v];
    uint4 raw[1];
    x.load(raw, Always(), [&](int) { return this->first(v); });
    return bits_as<Vec<T>>(raw[0]);
  }

  // The only walk over all of the row.
  __device__ void read(int& turn) {
    uint4 batch[kBatch<T>];
    const uint4 low = bits_as<uint4>(splat_vec(from_acc<T>(-infinity<A>())));
    const auto load_batch = [&](int first) {
#pragma unroll
      for (int j = 0; j < kBatch<T>; ++j) batch[j] = low;
      const auto number = [&](int j) { return first + j * kRowThreads; };
      x.load(batch, [&](int j) { return number(j) < this->vectors; }, [&](int j) { return this->first(number(j)); });
    };
    const auto vector = [&](int j) { return bits_as<Vec<T>>(batch[j]); };
    load_batch(threadIdx.x);
#pragma unroll
    for (int j = 0; j < kBatch<T>; ++j) max = fmax(max_of(vector(j)), max);
    const A first_max = row_max<kRowThreads>(max, turn);
    const A bound =
        first_max < infinity<A>() ? add_down(first_max, -policy.reach) : first_max - first_max;  // NaN: none is dead
    for (int i = 0, v = threadIdx.x; v < this->vectors; i += kBatch<T>) {
#pragma unroll
      for (int j = 0; j < kBatch<T>; ++j, v += kRowThreads) {
        const Vec<T> e = vector(j);
        bool is_alive = false;
#pragma unroll
        for (int k = 0; k < kSize; ++k) is_alive |= !(to_acc(e.v[k]) <= bound);
        if (v < kept && (is_alive || live.shift != 0)) cache[v] = e;
        if (!is_alive || v >= this->vectors) continue;
        live.add(i + j);
        max = fmax(max_of(e), max);
      }
      load_batch(v);
    }
    m = reference_point(row_max<kRowThreads>(max, turn));
  }

  __device__ auto sum(const Threshold<A>& tau) {
    SupportSum<A, Policy::kCounts> own;
    above = 0;
#pragma unroll 1
    for (uint64_t bits = live.bits; bits != 0; bits &= bits - 1) {
      const int bit = __ffsll(static_cast<long long>(bits)) - 1;
      const int64_t before = own.count();
#pragma unroll 1
      for (int i = bit << live.shift; i < (bit + 1) << live.shift; ++i) {
        const int v = threadIdx.x + i * kRowThreads;
        if (v >= this->vectors) break;
        const Vec<T> e = load(v);
#pragma unroll
        for (int k = 0; k < kSize; ++k) add_term(own, policy, tau.above(policy.z(to_acc(e.v[k]), m)));
        own.join_part();
      }
      if (own.count() != before) above |= uint64_t(1) << bit;
    }
    add_term(own, policy, tau.above(policy.z(loose_value, m)));
    return own.total();
  }

  template <class Output>
  __device__ void write(const Output& y, const Threshold<A>& tau) const {
    const Vec<T> dead = splat_vec(from_acc<T>(tau.t != tau.t ? tau.t : A(0)));
    for (int i = 0, v = threadIdx.x; v < this->vectors; ++i, v += kRowThreads) {
      Vec<T> e = dead;
      if (live.has(i)) {
        e = load(v);
#pragma unroll
        for (int k = 0; k < kSize; ++k)
          e.v[k] = from_acc<T>(probability(policy, tau.above(policy.z(to_acc(e.v[k]), m))));
      }
      y.put(this->first(v), e);
    }
    if (loose_at >= 0) y.set(loose_at, from_acc<T>(probability(policy, tau.above(policy.z(loose_value, m)))));
  }
};

template <class Rows, int kRowThreads, class Policy>
__global__ void __launch_bounds__(kRowThreads, kBlocksAtLeast<typename Rows::T, kRowThreads>)
    entmax_fwd_block_kernel(Rows rows, Policy policy_of_all, int kept) {
  using T = typename Rows::T;
  using A = typename Rows::A;
  TSE_DYNAMIC_SHARED(Vec<T>, cache);
  TSE_SHARED(ThresholdSearch<A>, search, 1);
  int turn = 0;
  const int64_t count = row_count(rows.map().rows);
  for (int64_t index = blockIdx.x; index < count; index += gridDim.x) {
    const auto policy = policy_of(rows, policy_of_all, index);
    const auto x = rows.elements(index);
    LiveRow<T, kRowThreads, typename Rows::Elements, std::remove_const_t<decltype(policy)>> row(x, rows.map().rows.n,
                                                                                                cache, kept, policy);
    row.read(turn);
    // Newton's steps from tau on; sum(): the terms of this thread.
    Threshold<A> tau;
    const auto solve = [&](bool of_all, const auto& sum) {
      for (bool begins = true, goes_on = true; goes_on; begins = false) {
        const auto s = row_reduce<kRowThreads>(sum(), turn, Join());
        if (of_all && s.sum >= 1) row.live.bits = row.above;  // tau is a lower bound, below which all is dead
        if (threadIdx.x == 0) {
          if (begins) search[0] = ThresholdSearch<A>{tau};
          search[0].step(s, policy.scale);
        }
        __syncthreads();
        tau = search[0];
        goes_on = search[0].goes_on;
      }
    };
    solve(false, [&] {
      SupportSum<A, Policy::kCounts> of_max;
      add_term(of_max, policy, tau.above(policy.z(row.max, row.m)));
      return of_max.total();
    });
    solve(true, [&] { return row.sum(tau); });
    if (!put_threshold<kRowThreads>(rows, index, row.m, tau)) row.write(rows.output(index, x), tau);
  }
}

template <class Policy, class Rows>
void launch_entmax_fwd(const Rows& rows, const Policy& policy, cudaStream_t stream) {
  using T = typename Rows::T;
  with_plan_of_rows(rows, [&](auto plan) {
    using Plan = decltype(plan);
    constexpr int kRowThreads = Plan::kThreads, kVectors = Plan::kVectors, kThreads = kBlockThreads<kRowThreads>;
    const int64_t count = row_count(rows.map().rows);
    if constexpr (kVectors > 0 || kRowThreads <= 32) {
      const auto kernel = entmax_fwd_kernel<Rows, kRowThreads, kVectors, Policy>;
      launch("entmax_fwd_kernel", kernel, grid_for(count, kRowsPerBlock<kRowThreads>, kernel, kThreads, 0), kThreads, 0,
             stream, rows, policy);
    } else {
      launch_rows<Plan, T>("entmax_fwd_block_kernel", entmax_fwd_block_kernel<Rows, kRowThreads, Policy>, count,
                           rows.map().rows.n, stream, rows, policy);
    }
  });
}

// Policy<A>: of the type of the arithmetic.
template <template <class> class Policy, class T>
void launch_stored_entmax_fwd(const RowMapParams& p, cudaStream_t stream) {
  launch_entmax_fwd(StoredRows<T>{p}, Policy<Acc<T>>(), stream);
}
template <template <class> class Policy>
void launch_prepared_entmax_fwd(const PreparedRowsParams& p, cudaStream_t stream) {
  with_prepared_rows(p, [&](auto rows) { launch_entmax_fwd(rows, Policy<typename decltype(rows)::A>(), stream); });
}

}  // namespace tse
