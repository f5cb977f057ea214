// Cross-entropy on the CPU where the class dimension is not the last one: the lanes of vectors are consecutive rows.
// [per ISA]
//
// Columns are walked in tiles of up to kColumns, class by class, so that memory is read in runs. Where backward follows
// at once, forward keeps the tile: classes lie a power of two apart as often as not, and push each other out of the
// cache.

constexpr int64_t kColumns = 2048;
constexpr int kClassesAtOnce = 4;  // so many share one pass over the columns' sums
constexpr int64_t kColumnElements = 65536;  // of the copy: half of L2 in fp32
constexpr int64_t kColumnTerms = 64;  // of a sum in the type; their sums are added in double
template <class A>
constexpr A kLargestSum = A(0x1p32);

// The losses of a vector of rows, from term, z and weight of their own class; of contiguous rows, too.
template <class T>
inline Vec<T> losses_of(const CrossEntropyParams& p, Vec<T> m, Vec<T> others, Vec<T> term, Vec<T> z, Vec<T> weight) {
  using A = Acc<T>;
  const A slope = A(p.transform.slope());
  const Vec<T> below = m * A(0.5) - z * A(0.5);  // half of a difference of finite logits is finite
  Vec<T> loss = negative_log<T>(term, others, below, 2 * slope) * weight;
  if (p.z_loss_weight != 0 && p.reduction == Reduction::kNone) {
    const Vec<T> lse = m * slope + log2(others + term) * kLn2<A>;
    loss += A(p.z_loss_weight) * lse * lse;
  }
  return loss;
}

// What the gradients of `count` rows are made of, in arrays of whole vectors: scale · term - coefficient · target, and
// of_own at the own class. own, mass: the weights of the own class and of all others; without coefficients no mass.
template <class T>
inline void grad_scales(const CrossEntropyParams& p, int64_t row, int64_t count, const Acc<T>* m, const Acc<T>* sum,
                        const Acc<T>* others, const Acc<T>* term, const Acc<T>* own, const Acc<T>* mass, Acc<T>* scale,
                        Acc<T>* of_own, Acc<T>* target = nullptr) {
  using A = Acc<T>;
  using V = Vec<T>;
  constexpr int kLanes = Accumulate<T>::kLanes;
  const bool has_lse = p.grad_lse != nullptr || p.z_loss_weight != 0, by_rows = has_lse || p.grad_output_stride != 0;
  V t = splat<V>(by_rows ? A(0) : A(grad_factors<A>(p, row, 0).target)), lse = {};
  for (int64_t j = 0; j < count; j += kLanes) {
    for (int64_t i = 0; by_rows && i < std::min<int64_t>(kLanes, count - j); ++i) {
      const GradFactors f = grad_factors<A>(p, row + j + i, has_lse ? lse_of(p.transform, m[j + i], sum[j + i]) : 0);
      t[i] = A(f.target);
      lse[i] = A(f.lse);
    }
    const V s = load(sum + j), w = load(own + j);
    const V of_others = mass != nullptr ? t * load(mass + j) + lse : lse;  // as GradFactors
    store(scale + j, (t * w + of_others) / s);
    store(of_own + j, of_others * (load(term + j) / s) - t * w * (load(others + j) / s));
    if (target != nullptr) store(target + j, t);
  }
}

template <class T>
struct ColumnTile {
  using A = Acc<T>;
  using Index = std::conditional_t<sizeof(A) == 8, int64_t, int32_t>;
  int64_t width;  // a multiple of the lanes
  std::unique_ptr<T[]> logits;  // (n, width)
  alignas(64) A m[kColumns] = {}, others[kColumns] = {}, sum[kColumns] = {};
  alignas(64) A own[kColumns] = {}, at_own[kColumns] = {}, term[kColumns] = {};  // weight, z and term of the own class
  alignas(64) A scale[kColumns] = {}, of_own[kColumns] = {};  // of grad_scales
  alignas(64) double total[kColumns] = {};
  alignas(64) Index target[kColumns] = {};  // -1: ignored

  // `copied`: whether a copy of the logits is wanted. None is larger than kTileBytes.
  ColumnTile(int64_t n, bool copied)
      : width(std::clamp<int64_t>(kColumnElements / std::max<int64_t>(n, 1), Accumulate<T>::kLanes, kColumns) /
              Accumulate<T>::kLanes * Accumulate<T>::kLanes),
        logits(copied && n * width * int64_t(sizeof(T)) <= kTileBytes ? new T[n * width]() : nullptr) {}

  // All bits set in the lanes whose target is c, none in the others; and where the target is not ignored.
  auto is_target(int64_t j, int64_t c) const { return targets(j) == splat<decltype(targets(j))>(c); }
  auto is_counted(int64_t j) const { return targets(j) >= decltype(targets(j)){}; }
  auto targets(int64_t j) const {
    decltype(Vec<T>{} > Vec<T>{}) t;
    std::memcpy(&t, target + j, sizeof t);
    return t;
  }
};

template <class T>
inline void set_targets(const CrossEntropyParams& p, int64_t row, int64_t count, ColumnTile<T>& tile) {
  for (int64_t i = 0; i < count; ++i) {
    const int64_t target = target_of(p, row + i);
    tile.target[i] = target == p.ignore_index ? -1 : target;
    if (p.weight != nullptr) tile.own[i] = target == p.ignore_index ? Acc<T>(0) : weight_of<Acc<T>>(p, target);
  }
  for (int64_t j = 0; p.weight == nullptr && j < count; j += Accumulate<T>::kLanes)
    store(tile.own + j, tile.is_counted(j) ? splat<Vec<T>>(1) : Vec<T>{});
}

// The logits of the own classes; of an ignored row any.
template <class T>
inline void load_own(const T* x, int64_t n, int64_t stride, int64_t count, ColumnTile<T>& tile) {
  for (int64_t j = 0; n > 0 && j < count; ++j)
    tile.at_own[j] = load_one(x + (tile.target[j] < 0 ? 0 : tile.target[j]) * stride + j);
}

// Adds classes [c, c + kClasses) to the columns' sums, and leaves a copy of their logits for backward.
template <int kClasses, class T>
[[gnu::flatten]] inline void add_classes(const T* x, int64_t c, int64_t n, int64_t stride, int64_t count,
                                         const Logits<T, false>& logits, ColumnTile<T>& tile) {
  constexpr int kLanes = Accumulate<T>::kLanes;
  T* copy = tile.logits.get();
  const int64_t ahead = c + 2 * kClasses <= n ? kClasses * stride : 0;  // farther than the hardware's prefetcher sees
  for (int64_t j = 0; j < count; j += kLanes) {
    const Vec<T> m = load(tile.m + j);
    Vec<T> sum = {};
    for (int k = 0; k < kClasses; ++k) {
      const T* p = x + (c + k) * stride + j;
      __builtin_prefetch(p + ahead);
      const Vec<T> v = j + kLanes <= count ? load(p) : load_part(p, count - j, Acc<T>(0));
      if (copy != nullptr) store(copy + (c + k) * tile.width + j, v);
      sum += tile.is_target(j, c + k) ? Vec<T>{} : logits.term(v, m);
    }
    store(tile.others + j, load(tile.others + j) + sum);
  }
}

// Sums the terms of each column but for its own class; false where a sum is out of range.
template <class T>
inline bool add_columns(const T* x, int64_t n, int64_t stride, int64_t count, const Logits<T, false>& logits,
                        ColumnTile<T>& tile) {
  constexpr int kLanes = Accumulate<T>::kLanes;
  const int64_t used = (count + kLanes - 1) / kLanes * kLanes;
  const bool is_short = n <= kColumnTerms;  // one part
  if (!is_short) std::fill_n(tile.total, used, 0.0);
  std::fill_n(tile.others, used, Acc<T>(0));
  for (int64_t begin = 0; begin < n; begin += kColumnTerms) {
    const int64_t end = std::min(begin + kColumnTerms, n);
    int64_t c = begin;
    for (; c + kClassesAtOnce <= end; c += kClassesAtOnce)
      add_classes<kClassesAtOnce>(x, c, n, stride, count, logits, tile);
    for (; c < end; ++c) add_classes<1>(x, c, n, stride, count, logits, tile);
    for (int64_t j = 0; !is_short && j < used; ++j) {
      tile.total[j] += double(tile.others[j]);
      tile.others[j] = 0;
    }
  }
  for (int64_t j = 0; !is_short && j < used; ++j) tile.others[j] = Acc<T>(tile.total[j]);
  Vec<T> outside = {};
  for (int64_t j = 0; j < count; j += kLanes)
    outside += tile.is_counted(j) & ~(load(tile.others + j) <= kLargestSum<Acc<T>>) ? splat<Vec<T>>(1) : Vec<T>{};
  return reduce_add(outside) == 0;
}

// The reference is the larger of the first class' logit and the own one: terms need not be below 1, only far from
// overflow, for the precision of floating point is the same everywhere. Columns where that does not hold get their
// maximum.
template <class T>
inline void fwd_columns(const T* x, int64_t n, int64_t stride, int64_t count, const Logits<T, false>& logits,
                        ColumnTile<T>& tile) {
  using A = Acc<T>;
  const A low = -std::numeric_limits<A>::infinity();
  constexpr int kLanes = Accumulate<T>::kLanes;
  load_own(x, n, stride, count, tile);
  for (int64_t j = 0; j < count; j += kLanes) {
    const Vec<T> first = n == 0 ? Vec<T>{} : j + kLanes <= count ? load(x + j) : load_part(x + j, count - j, A(0));
    store(tile.m + j, vmax(load(tile.at_own + j), first));  // of NaN the first
  }
  if (!add_columns(x, n, stride, count, logits, tile)) {
    for (int64_t j = 0; j < count; ++j) {
      if (tile.others[j] <= kLargestSum<A> || tile.target[j] < 0) continue;
      A max = low;
      for (int64_t c = 0; c < n; ++c) max = std::max(max, load_one(x + c * stride + j));  // NaN aside
      tile.m[j] = max == low ? A(0) : max;
    }
    add_columns(x, n, stride, count, logits, tile);
  }
  for (int64_t j = 0; j < count; j += kLanes) {
    const Vec<T> term = logits.term(load(tile.at_own + j), load(tile.m + j));
    store(tile.term + j, term);
    store(tile.sum + j, load(tile.others + j) + term);
  }
}

// The gradient of `count` columns; x may be the tile's own copy.
template <class T>
[[gnu::flatten]] inline void bwd_columns(const T* x, int64_t stride, T* g, int64_t grad_stride, int64_t n,
                                         int64_t count, const Logits<T, false>& logits, const ColumnTile<T>& tile) {
  constexpr int kLanes = Accumulate<T>::kLanes;
  for (int64_t c = 0; c < n; ++c) {
    const auto value = [&](Vec<T> v, int64_t j) {
      const Vec<T> term = logits.term(v, load(tile.m + j));
      const Vec<T> grad = tile.is_target(j, c) ? load(tile.of_own + j) : term * load(tile.scale + j);
      return tile.is_counted(j) ? grad : Vec<T>{};  // 0 even where the logits of an ignored row are not finite
    };
    const T* row = x + c * stride;
    T* out = g + c * grad_stride;
    int64_t j = 0;
    for (; j + kLanes <= count; j += kLanes) store(out + j, value(load(row + j), j));
    if (j < count) store_part(out + j, count - j, value(load_part(row + j, count - j, Acc<T>(0)), j));
  }
}

// What is per row is done for all rows of the tile at once, too: with few classes it is most of the work.
template <class T>
inline void fwd_column_rows(const CrossEntropyParams& p, int64_t row, int64_t count, const Logits<T, false>& logits,
                            ColumnTile<T>& tile) {
  using A = Acc<T>;
  constexpr int kLanes = Accumulate<T>::kLanes;
  const T* x = static_cast<const T*>(p.input) + row_offset(p.rows, row);
  fwd_columns(x, p.rows.n, p.rows.stride_n, count, logits, tile);
  const auto put = [&](void* array, int64_t j, Vec<T> v) {
    A* to = static_cast<A*>(array) + row + j;
    if (j + kLanes <= count) store(to, v);
    else store_part(to, count - j, v);
  };
  for (int64_t j = 0; j < count; j += kLanes) {
    const Vec<T> m = load(tile.m + j), others = load(tile.others + j);
    const Vec<T> term = load(tile.term + j), z = load(tile.at_own + j);
    const Vec<T> loss = losses_of<T>(p, m, others, term, z, load(tile.own + j));
    put(p.row_m, j, m);
    put(p.row_sum, j, load(tile.sum + j));
    put(p.row_others, j, others);
    put(p.row_loss, j, tile.is_counted(j) ? loss : Vec<T>{});
  }
}

template <class T, bool kForward>
inline void bwd_column_rows(const CrossEntropyParams& p, int64_t row, int64_t count, const Logits<T, false>& logits,
                            ColumnTile<T>& tile) {
  using A = Acc<T>;
  const bool copied = tile.logits != nullptr;
  const T* input = static_cast<const T*>(p.input) + row_offset(p.rows, row);
  if (!kForward) {  // else forward has just left them there
    std::memcpy(tile.m, static_cast<const A*>(p.row_m) + row, count * sizeof(A));
    std::memcpy(tile.sum, static_cast<const A*>(p.row_sum) + row, count * sizeof(A));
    std::memcpy(tile.others, static_cast<const A*>(p.row_others) + row, count * sizeof(A));
    load_own(input, p.rows.n, p.rows.stride_n, count, tile);
    for (int64_t j = 0; j < count; j += Accumulate<T>::kLanes)
      store(tile.term + j, logits.term(load(tile.at_own + j), load(tile.m + j)));
  }
  grad_scales<T>(p, row, count, tile.m, tile.sum, tile.others, tile.term, tile.own, nullptr, tile.scale, tile.of_own);
  bwd_columns(copied ? tile.logits.get() : input, copied ? tile.width : p.rows.stride_n,
              static_cast<T*>(p.grad_input) + row_offset(p.grad_rows, row), p.grad_rows.stride_n, p.rows.n, count,
              logits, tile);
}

template <class T, bool kForward, bool kBackward>
void rows_of_columns(const CrossEntropyParams& p, int64_t begin, int64_t end) {
  const Logits<T, false> logits(p.transform);
  ColumnTile<T> tile(p.rows.n, kForward && kBackward);
  for (int64_t row = begin, count; row < end; row += count) {
    count = std::min<int64_t>({tile.width, end - row, p.rows.inner - row % p.rows.inner});
    set_targets(p, row, count, tile);
    if (kForward) fwd_column_rows(p, row, count, logits, tile);
    if (kBackward) bwd_column_rows<T, kForward>(p, row, count, logits, tile);
  }
}
