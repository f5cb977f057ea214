// Cross-entropy forward on CUDA. [CUDA]
//
// Each logit is read once: every thread keeps the sum of the terms of its part, with a reference that is raised where
// terms get large; of a row in registers it is the largest logit. Where grad_output is known or guessed, the row stays
// on chip and its gradient is written at once. No load waits for another: the target is read a row ahead, and its logit
// when the row is on its way. For mean and sum each block adds the losses of its rows in double, and the last one
// to finish the sums of the blocks: a fixed order on one card. One launch, but for the divisor of a mean over many
// rows. Log-probabilities are never stored.
#include "common/cuda/exp_sum.cuh"
#include "common/cuda/stream_state.cuh"
#include "cross_entropy/row_gradient.cuh"

namespace tse {
namespace {

constexpr int kStates = 1024;
TSE_DEVICE_ARRAY(CrossEntropyState, states, kStates);

// The largest logit so far and where it is; NaN is larger, and the first of equals.
template <class A, class Index>
struct Best {
  A value = -infinity<A>();
  Index index = std::is_same_v<Index, int> ? Index(INT_MAX) : Index(INT64_MAX);
};
template <class A, class Index>
__device__ inline Best<A, Index> better(Best<A, Index> a, Best<A, Index> b) {
  const bool a_nan = a.value != a.value, b_nan = b.value != b.value;
  if (a_nan != b_nan) return a_nan ? a : b;
  if (!a_nan && a.value != b.value) return a.value > b.value ? a : b;
  return a.index < b.index ? a : b;
}

// ---- sums over rows -----------------------------------------------------------------------------------------------

// Of all threads of the block, in every one.
template <int kThreads>
__device__ inline CrossEntropySums block_sums(const CrossEntropySums& mine, int& turn) {
  return row_reduce<kThreads>(mine, turn, [](const CrossEntropySums& a, const CrossEntropySums& b) {
    return CrossEntropySums{a.loss + b.loss, a.z_loss + b.z_loss, a.weight + b.weight, a.counted + b.counted};
  });
}

// The weights and the number of the counted targets, of rows [begin, end), by a block.
template <class A, int kThreads>
__device__ inline CrossEntropySums count_targets(const CrossEntropyParams& p, int64_t begin, int64_t end, int& turn) {
  CrossEntropySums s = {0, 0, 0, 0};
#pragma unroll 4
  for (int64_t row = begin + threadIdx.x; row < end; row += kThreads) {
    const int64_t target = target_of(p, row);
    if (!is_counted(p, target) || p.rows.n == 0) continue;  // of no classes the mean is NaN
    const bool is_weighted = p.target != nullptr && p.weight != nullptr;
    const bool is_class = target >= 0 && target < p.rows.n;  // what is none stops the kernel at its row
    s.weight += !is_weighted ? 1.0 : is_class ? double(static_cast<const A*>(p.weight)[target]) : 0.0;
    s.counted += 1;
  }
  return block_sums<kThreads>(s, turn);
}

// Blocks add their sums, the last one those of all of them: true in its threads.
template <int kThreads>
__device__ inline bool add_blocks(const CrossEntropyParams& p, unsigned* ticket, CrossEntropySums& s, int& turn) {
  if (gridDim.x == 1) return true;
  if (threadIdx.x == 0) p.sums[blockIdx.x] = s;
  if (!is_last_block(ticket)) return false;
  s = {0, 0, 0, 0};
  for (int64_t block = threadIdx.x; block < gridDim.x; block += kThreads) {
    const CrossEntropySums other = p.sums[block];
    s = {s.loss + other.loss, s.z_loss + other.z_loss, s.weight + other.weight, s.counted + other.counted};
  }
  s = block_sums<kThreads>(s, turn);
  return true;
}

template <class A>
__device__ inline void write_totals(const CrossEntropyParams& p, CrossEntropySums s) {
  if (threadIdx.x != 0) return;
  p.total_weight[0] = s.weight;
  p.total_weight[1] = s.counted;
  if (p.loss == nullptr) return;
  if (p.reduction == Reduction::kMean) {
    s.loss /= s.weight;
    if (p.z_loss_weight != 0) s.z_loss /= s.counted;
  }
  *static_cast<A*>(p.loss) = A(s.loss + s.z_loss);
  if (p.z_loss != nullptr) *static_cast<A*>(p.z_loss) = A(s.z_loss);
}

// ---- grad_output, as forward assumes it ---------------------------------------------------------------------------

struct Known {
  bool is_known;
  double value;  // NaN where it is not known
};
// The same in every block, since only backward changes the state.
__device__ inline Known known_grad_output(const CrossEntropyParams& p, const CrossEntropyState* state) {
  const Known unknown = {false, infinity<double>() - infinity<double>()};
  if (p.assumed == Assumed::kNone) return unknown;
  if (p.assumed == Assumed::kFixed) return {true, p.fixed_grad_output};
  const bool repeated = state->repeated[int(p.reduction)] != 0;
  const double last = state->last[int(p.reduction)], size = fabs(last);
  if (p.assumed == Assumed::kGuessed) return repeated ? Known{true, last} : unknown;
  const bool usable = repeated && size >= 0x1p-40 && size <= 0x1p40;  // whatever comes, its ratio is finite
  return {true, usable ? last : 1.0};
}

constexpr int64_t kCountedByEachBlock = 4096;  // rows: 32 KiB, from L2
constexpr int kCountThreads = 512;

// The divisor of a mean over many rows, before the kernel that needs it.
template <class A>
__global__ void __launch_bounds__(kCountThreads) cross_entropy_count_kernel(CrossEntropyParams p, unsigned* ticket) {
  const int64_t rows = row_count(p.rows), share = (rows + gridDim.x - 1) / gridDim.x, begin = blockIdx.x * share;
  int turn = 0;
  CrossEntropySums s = count_targets<A, kCountThreads>(p, begin, begin + share < rows ? begin + share : rows, turn);
  if (!add_blocks<kCountThreads>(p, ticket, s, turn) || threadIdx.x != 0) return;
  p.total_weight[0] = s.weight;
  p.total_weight[1] = s.counted;
}

// ---- forward ------------------------------------------------------------------------------------------------------

// counted_before: the divisors are there. kept_vectors: of each row, where a gradient may be written.
struct Launch {
  CrossEntropyState* state;
  bool counted_before;
  int kept_vectors;
};

// kGeneral: with softcap, coefficients of all classes, or predictions.
template <class T, int kRowThreads, int kVectors, bool kGeneral>
__global__ void __launch_bounds__(kBlockThreads<kRowThreads>, kBlocksAtLeast<T, kRowThreads, kVectors>)
    cross_entropy_fwd_kernel(CrossEntropyParams p, Logits<Acc<T>> logits, Launch launch) {
  using A = Acc<T>;
  constexpr int kThreads = kBlockThreads<kRowThreads>;
  TSE_DYNAMIC_SHARED(uint4, kept);
  TSE_SHARED(CrossEntropySums, sums_of_rows, kRowsPerBlock<kRowThreads>);
  CrossEntropySums& of_rows = sums_of_rows[threadIdx.x / kRowThreads];
  const bool is_first = threadIdx.x % kRowThreads == 0;
  if (is_first) of_rows = {0, 0, 0, 0};

  const T* input = static_cast<const T*>(p.input);
  const int64_t rows = row_count(p.rows), n = p.rows.n, stride = p.rows.stride_n;
  int turn = 0;
  TSE_SHARED(RowGradOutput, shared_grad, 1);
  TSE_SHARED(double, divisors, 2);
  const bool writes_gradient = known_grad_output(p, launch.state).is_known;
  if (launch.counted_before || (writes_gradient && p.reduction == Reduction::kMean)) {
    CrossEntropySums s = {0, 0, 0, 0};
    if (!launch.counted_before) s = count_targets<A, kThreads>(p, 0, rows, turn);
    if (threadIdx.x == 0) {
      divisors[0] = launch.counted_before ? p.total_weight[0] : s.weight;
      divisors[1] = launch.counted_before ? p.total_weight[1] : s.counted;
    }
  }
  if (threadIdx.x == 0) {
    const double assumed = known_grad_output(p, launch.state).value;
    if (blockIdx.x == 0) *p.guess = assumed;
    if (writes_gradient) shared_grad[0] = row_grad_output<A>(p, assumed, divisors);
  }
  __syncthreads();

  int64_t row = first_row<kRowThreads>(), next_target = row < rows ? target_of(p, row) : 0;
  for (; row < rows; row += row_step<kRowThreads>()) {
    const T* x = input + row_offset(p.rows, row);
    constexpr int kLoads = kGeneral && sizeof(T) == 2 ? 1 : kLogitLoads<kRowThreads, kGeneral>;
    Row<T, kRowThreads, kVectors, kLoads> logits_of_row(
        {x, stride}, n, kept + threadIdx.x / kRowThreads * launch.kept_vectors, launch.kept_vectors);
    const int64_t target = next_target, next = row + row_step<kRowThreads>();
    const bool counted = is_counted(p, target);
    ExpSum<A, kGeneral> s;
    OwnClass<T, kRowThreads> own = {-1, 0};
    A own_logit = 0;
    using Index = typename OwnClass<T, kRowThreads>::Index;
    Best<A, Index> best;
    if (counted) logits_of_row.load();  // the logits of an ignored row are not even read
    if (next < rows) next_target = target_of(p, next);
    if (counted) {  // the same in all threads of the row
      own = own_class<T, kRowThreads, kGeneral>(p, row, target, turn);
      const Coefficients<T, kRowThreads> coefficients(p, row);
      const auto walk = [&](int64_t i, const T* v, auto count, A max) {
        constexpr int kCount = decltype(count)::value;
        A z[kCount];
#pragma unroll
        for (int k = 0; k < kCount; ++k) {
          z[k] = to_acc(v[k]);
          if constexpr (kGeneral) {
            if (p.predictions != nullptr) best = better(best, {z[k], Index(i + k)});
            z[k] = logits.cap(z[k]);
          }
        }
        if constexpr (kGeneral) max = max_of(z);
        const Index at = own.index - Index(i);
        add(s, z, max, at >= 0 && at < kCount ? int(at) : -1, logits, [&](int k) { return coefficients(i + k); });
      };
      const auto scalar = [&](int64_t i, T v) { walk(i, &v, std::integral_constant<int, 1>{}, to_acc(v)); };
      const auto vector = [&](int64_t i, const Vec<T>& v) {
        constexpr int kCount = kGeneral && Vec<T>::kSize > 4 ? 4 : Vec<T>::kSize;  // more would not fit into registers
        // Of a row in registers the reference is the largest logit.
        const A max = kGeneral || kVectors > 0 ? -infinity<A>() : max_of(v);
#pragma unroll
        for (int k = 0; k < Vec<T>::kSize; k += kCount)
          walk(i + k, v.v + k, std::integral_constant<int, kCount>{}, max);
      };
      if constexpr (kVectors > 0) {
        A max = -infinity<A>();
        maxima(logits_of_row, [&](A of_vector) { max = fmax(of_vector, max); });
        max = lanes_reduce<(kRowThreads < 32 ? kRowThreads : 32)>(max, [](A a, A b) { return a > b ? a : b; });
        s.set(max, logits.margin);
      }
      logits_of_row.read(writes_gradient, vector, scalar);
      if (own.index >= 0) own_logit = to_acc(x[own.index * stride]);
      if constexpr (kRowThreads <= 32) row_barrier<kRowThreads>();  // all lanes have read it
      s = sum_of_threads<kRowThreads>(s, turn, logits);
      if constexpr (kGeneral) {
        if (p.predictions != nullptr)
          best = row_reduce<kRowThreads>(best, turn, [](auto a, auto b) { return better(a, b); });
      }
    }
    const A z_own = logits.cap(own_logit);
    if (own.index >= 0 && z_own > s.limit) s.raise_reference(z_own, logits);
    const A own_term = own.index < 0 ? A(0) : logits.term(z_own, s.half);
    RowStatistics<A> of_row = {s.m(), 0, s.sums.sum.value(), 0};
    of_row.sum = of_row.others + own_term;
    if constexpr (kGeneral) of_row.mass = s.sums.mass.value();
    if (is_first) {
      A loss = 0;
      double z_loss = 0;
      if (counted) {
        if (own.index >= 0)
          loss = own.weight * negative_log(own_term, of_row.others, of_row.sum, logits.below(z_own, s.half));
        if constexpr (kGeneral) {
          if (p.row_mass != nullptr) loss += of_row.mass * log(of_row.sum) - s.sums.linear.value() * logits.slope * 2;
        }
        if (p.z_loss_weight != 0) {
          const double lse = logits.lse(of_row.m, of_row.sum);
          z_loss = p.z_loss_weight * lse * lse;
          if (p.reduction == Reduction::kNone) loss += A(z_loss);
        }
        if (n != 0) {
          of_rows.loss += double(loss);
          of_rows.z_loss += z_loss;
          of_rows.weight += 1;
          of_rows.counted += 1;
        }
      }
      if (p.row_loss != nullptr) static_cast<A*>(p.row_loss)[row] = loss;
      static_cast<A*>(p.row_m)[row] = of_row.m;
      static_cast<A*>(p.row_sum)[row] = of_row.sum;
      static_cast<A*>(p.row_others)[row] = of_row.others;
      if (p.row_mass != nullptr) static_cast<A*>(p.row_mass)[row] = of_row.mass;
      if (p.predictions != nullptr) p.predictions[row] = counted ? best.index : p.ignore_index;
    }
    if (!writes_gradient) continue;
    T* g = static_cast<T*>(p.grad_input) + row_offset(p.grad_rows, row);
    if (counted)
      write_gradient(StoredOutput<T>(g, p.grad_rows.stride_n, x), logits_of_row, own, own_logit,
                     RowGradient<T, kRowThreads, kGeneral>(p, logits, row, of_row, own, shared_grad[0]));
    else zero_row<kRowThreads>(g, p.grad_rows.stride_n, n);
  }

  if (p.reduction == Reduction::kNone && p.predictions == nullptr) return;
  CrossEntropySums s = block_sums<kThreads>(is_first ? of_rows : CrossEntropySums{0, 0, 0, 0}, turn);
  if (!add_blocks<kThreads>(p, &launch.state->ticket, s, turn)) return;
  // The sum of the weights has the bits that a gradient written here was divided by, so that backward finds the same.
  if (launch.counted_before) {
    s.weight = divisors[0];
    s.counted = divisors[1];
  } else if (p.reduction == Reduction::kMean && p.target != nullptr && p.weight != nullptr) {
    s.weight = count_targets<A, kThreads>(p, 0, rows, turn).weight;
  }
  write_totals<A>(p, s);
}

// Whether blocks add what they have found.
bool adds(const CrossEntropyParams& p) { return p.reduction != Reduction::kNone || p.predictions != nullptr; }

// Calls f(plan, general) for the kernel of the call.
template <class T, class F>
void with_kernel(const CrossEntropyParams& p, const F& f) {
  if (p.is_general() || p.predictions != nullptr)
    with_plan_of<T, true>(p, [&](auto plan) { f(plan, std::true_type()); });
  else with_plan_of<T, false>(p, [&](auto plan) { f(plan, std::false_type()); });
}

// The most that a grid which adds may have: those that run at a time.
template <class T>
int64_t most_blocks(const CrossEntropyParams& p) {
  int64_t blocks = 1;
  with_kernel<T>(p, [&](auto plan, auto) {
    constexpr int kRowThreads = decltype(plan)::kThreads, kThreads = kBlockThreads<kRowThreads>;
    const DeviceLimits limits = device_limits();
    blocks = std::min(grid_for(std::max<int64_t>(row_count(p.rows), 1), kRowsPerBlock<kRowThreads>),
                      resident_blocks(limits, kThreads, 0) * limits.multiprocessors);
  });
  return blocks;
}

template <class T>
int64_t scratch(const CrossEntropyParams& p) {
  return adds(p) ? most_blocks<T>(p) * sizeof(CrossEntropySums) + sizeof(CrossEntropyState) : 0;
}

template <class T>
void launch_fwd(const CrossEntropyParams& p, cudaStream_t stream) {
  using A = Acc<T>;
  const int64_t rows = row_count(p.rows);
  if (rows == 0 && !adds(p)) return;
  Launch how = {nullptr, false, 0};
  const int64_t most = adds(p) ? most_blocks<T>(p) : kMaxBlocks;
  if (adds(p)) {
    how.state = cross_entropy_state(stream);
    if (how.state == nullptr) {  // one for this call alone
      how.state = reinterpret_cast<CrossEntropyState*>(p.sums + most);
      zero_memory(how.state, sizeof(CrossEntropyState), stream);
    }
  }
  if (rows > kCountedByEachBlock && p.target != nullptr && p.reduction == Reduction::kMean &&
      (p.weight != nullptr || p.assumed != Assumed::kNone)) {
    how.counted_before = true;
    launch("cross_entropy_count_kernel", cross_entropy_count_kernel<A>,
           std::min(grid_for(rows, kCountedByEachBlock), most), kCountThreads, 0, stream, p, &how.state->ticket);
  }
  with_kernel<T>(p, [&](auto plan, auto general) {
    using Plan = decltype(plan);
    constexpr int kRowThreads = Plan::kThreads, kThreads = kBlockThreads<kRowThreads>,
                  kRows = kRowsPerBlock<kRowThreads>;
    if (kRowThreads > 1 && Plan::kVectors == 0 && p.assumed != Assumed::kNone)
      how.kept_vectors = kept_vectors(device_limits(), p.rows.n * sizeof(T) / 16, kRows);
    const auto kernel = cross_entropy_fwd_kernel<T, kRowThreads, Plan::kVectors, decltype(general)::value>;
    const size_t shared = size_t(how.kept_vectors) * 16 * kRows;
    const int64_t blocks = grid_for(std::max<int64_t>(rows, 1), kRows, kernel, kThreads, shared);
    launch("cross_entropy_fwd_kernel", kernel, std::min(blocks, most), kThreads, shared, stream, p,
           Logits<A>(p.transform), how);
  });
}

}  // namespace

int64_t cross_entropy_scratch(const CrossEntropyParams& p) { TSE_BY_DTYPE(p.dtype, scratch, p) return 0; }

CrossEntropyState* cross_entropy_state(cudaStream_t stream) {
  static StreamStates<CrossEntropyState, kStates> of_streams([] { return device_address(states); });
  return of_streams.of(stream);
}

void launch_cross_entropy_fwd(const CrossEntropyParams& p, cudaStream_t stream) {
  TSE_BY_DTYPE(p.dtype, launch_fwd, p, stream)
}

}  // namespace tse
