// Cross-entropy on the CPU where the class dimension is not the last one: the lanes of vectors are neighbouring rows.
// [per ISA]
//
// Columns are walked in tiles of up to kColumns, class by class, so that memory is read in runs. Where backward follows
// at once, forward keeps the tile: classes lie a power of two apart as often as not, and push each other out of the
// cache. For the same reason the target's logit is caught in passing, and its gradient is made in passing.

constexpr int64_t kColumns = 2048;
constexpr int kClassesAtOnce = 4;  // so many share one pass over the columns' sums
constexpr int64_t kColumnElements = 65536;  // of the copy: half of L2 in fp32
template <class A>
constexpr A kLargestSum = A(0x1p32);

// The losses of a vector of rows, whose target's logit has exponent t; of contiguous rows, too. A probability next to 1
// may be rounded above it.
template <class T>
inline Vec<T> losses_of(const CrossEntropyParams& p, Vec<T> m, Vec<T> sum, Vec<T> t, Vec<T> weight) {
  using A = Acc<T>;
  const Vec<T> term = exp2<T>(t);
  const auto likely = term > sum * A(0.25);
  const Vec<T> l = log2(likely ? sum / term : sum) - (likely ? Vec<T>{} : t);
  Vec<T> loss = vmax(Vec<T>{}, l) * kLn2<A> * weight;
  if (p.z_loss_weight != 0 && p.reduction == Reduction::kNone) {
    const Vec<T> lse = (m + log2(sum)) * kLn2<A>;
    loss += A(p.z_loss_weight) * lse * lse;
  }
  return loss;
}

// grad = (term - shift at the target) · scale - coefficient · of_target, of `count` rows; arrays of whole vectors.
// mass: Σ of a row's weights, weight: the target's own. The bits do not depend on how the incoming gradient is stored.
template <class T, class A = Acc<T>>
inline void grad_scales(const CrossEntropyParams& p, int64_t row, int64_t count, const A* m, const A* sum,
                        const A* weight, const A* mass, A* scale, A* shift, Acc<T>* of_target) {
  using V = Vec<T>;
  constexpr int kLanes = Accumulate<T>::kLanes;
  if (p.grad_lse != nullptr || p.z_loss_weight != 0) {
    for (int64_t i = 0; i < count; ++i) {
      const double s = sum[i], lse = p.z_loss_weight == 0 ? 0 : (m[i] + std::log2(s)) * kLn2<A>;
      const GradFactors f = grad_factors<A>(p, row + i, lse, mass[i]);
      const double target = weight[i] * f.target;
      const double softmax = f.softmax != 0 ? f.softmax : 1e-30 * target;  // the two may cancel
      scale[i] = A(softmax / s);
      shift[i] = A(softmax == target ? s : target / softmax * s);
      if (of_target != nullptr) of_target[i] = A(f.target);
    }
    return;
  }
  const bool is_dense = p.grad_output_stride != 0;
  V target = splat<V>(is_dense ? A(0) : A(grad_factors<A>(p, row, 0, 0).target));
  for (int64_t j = 0; j < count; j += kLanes) {
    for (int64_t i = 0; is_dense && i < std::min<int64_t>(kLanes, count - j); ++i)
      target[i] = A(grad_factors<A>(p, row + j + i, 0, 0).target);
    const V s = load(sum + j), w = load(weight + j);
    const V all = load(mass + j) != V{} ? load(mass + j) : w * A(1e-30);  // negative weights may cancel
    store(scale + j, all * target / s);
    store(shift + j, all == w ? s : s * (w / all));
    if (of_target != nullptr) store(of_target + j, target);
  }
}

template <class T>
struct ColumnTile {
  using A = Acc<T>;
  using Index = std::conditional_t<sizeof(A) == 8, int64_t, int32_t>;
  int64_t width;  // a multiple of the lanes
  std::unique_ptr<T[]> logits;  // (n, width)
  alignas(64) A m[kColumns] = {}, sum[kColumns] = {}, weight[kColumns] = {};
  alignas(64) A scale[kColumns] = {}, shift[kColumns] = {};  // of grad_scales
  alignas(64) A at_target[kColumns] = {};  // the target's logit
  alignas(64) Index target[kColumns] = {};  // -1: ignored

  ColumnTile(int64_t n, bool copied)
      : width(std::clamp<int64_t>(kColumnElements / std::max<int64_t>(n, 1), Accumulate<T>::kLanes, kColumns) /
              Accumulate<T>::kLanes * Accumulate<T>::kLanes),
        logits(copied ? new T[n * width]() : nullptr) {}

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
    if (p.weight != nullptr) tile.weight[i] = target == p.ignore_index ? Acc<T>(0) : weight_of<Acc<T>>(p, target);
  }
  for (int64_t j = 0; p.weight == nullptr && j < count; j += Accumulate<T>::kLanes)
    store(tile.weight + j, tile.is_counted(j) ? splat<Vec<T>>(1) : Vec<T>{});
}

// Adds classes [c, c + kClasses) to the columns' sums, and leaves a copy of their logits for backward.
template <int kClasses, class T>
[[gnu::flatten]] inline void add_classes(const T* x, int64_t c, int64_t n, int64_t stride, int64_t count,
                                         const Logits<T, false>& logits, ColumnTile<T>& tile) {
  constexpr int kLanes = Accumulate<T>::kLanes;
  T* copy = tile.logits.get();
  const int64_t ahead = c + 2 * kClasses <= n ? kClasses * stride : 0;  // farther than the hardware's prefetcher sees
  for (int64_t j = 0; j < count; j += kLanes) {
    const auto target = tile.targets(j);
    const Vec<T> m = load(tile.m + j);
    Vec<T> sum = {}, at_target = load(tile.at_target + j);
    for (int k = 0; k < kClasses; ++k) {
      const T* p = x + (c + k) * stride + j;
      __builtin_prefetch(p + ahead);
      const Vec<T> v = j + kLanes <= count ? load(p) : load_part(p, count - j, Acc<T>(0));
      if (copy != nullptr) store(copy + (c + k) * tile.width + j, v);
      at_target = target == splat<decltype(+target)>(c + k) ? v : at_target;
      sum += logits.term(v, m);
    }
    store(tile.sum + j, load(tile.sum + j) + sum);
    store(tile.at_target + j, at_target);
  }
}

// Σ exp2(x · L - m) of each column; false where a sum is out of range.
template <class T>
inline bool add_columns(const T* x, int64_t n, int64_t stride, int64_t count, const Logits<T, false>& logits,
                        ColumnTile<T>& tile) {
  using A = Acc<T>;
  std::fill_n(tile.sum, tile.width, A(0));
  int64_t c = 0;
  for (; c + kClassesAtOnce <= n; c += kClassesAtOnce)
    add_classes<kClassesAtOnce>(x, c, n, stride, count, logits, tile);
  for (; c < n; ++c) add_classes<1>(x, c, n, stride, count, logits, tile);
  Vec<T> outside = {};
  for (int64_t j = 0; j < count; j += Accumulate<T>::kLanes)
    outside += tile.is_counted(j) & ~(load(tile.sum + j) <= kLargestSum<A>) ? splat<Vec<T>>(A(1)) : Vec<T>{};
  return reduce_add(outside) == 0;
}

// The reference is the first class' logit: terms need not be below 1, only far from overflow, for the precision of
// floating point is the same everywhere. Columns where that does not hold get their maximum.
template <class T>
inline void fwd_columns(const T* x, int64_t n, int64_t stride, int64_t count, const Logits<T, false>& logits,
                        ColumnTile<T>& tile) {
  using A = Acc<T>;
  const A low = -std::numeric_limits<A>::infinity();
  constexpr int kLanes = Accumulate<T>::kLanes;
  for (int64_t j = 0; j < count; j += kLanes) {
    const Vec<T> first = n == 0 ? Vec<T>{} : j + kLanes <= count ? load(x + j) : load_part(x + j, count - j, A(0));
    store(tile.m + j, logits.references(first));
  }
  if (add_columns(x, n, stride, count, logits, tile)) return;
  for (int64_t j = 0; j < count; ++j) {
    if (tile.sum[j] <= kLargestSum<A> || tile.target[j] < 0) continue;
    A max = low;
    for (int64_t c = 0; c < n; ++c) max = std::max(max, load_one(x + c * stride + j));  // NaN aside
    tile.m[j] = max == low ? A(0) : logits.reference(max);
  }
  add_columns(x, n, stride, count, logits, tile);
}

// The gradient of `count` columns; x may be the tile's own copy.
template <class T>
[[gnu::flatten]] inline void bwd_columns(const T* x, int64_t stride, T* g, int64_t grad_stride, int64_t n,
                                         int64_t count, const Logits<T, false>& logits, const ColumnTile<T>& tile) {
  constexpr int kLanes = Accumulate<T>::kLanes;
  for (int64_t c = 0; c < n; ++c) {
    const auto value = [&](Vec<T> v, int64_t j) {
      const Vec<T> term = logits.term(v, load(tile.m + j));
      const Vec<T> grad = (term - (tile.is_target(j, c) ? load(tile.shift + j) : Vec<T>{})) * load(tile.scale + j);
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
    const Vec<T> m = load(tile.m + j), sum = load(tile.sum + j);
    const Vec<T> loss = losses_of<T>(p, m, sum, logits.exponent(load(tile.at_target + j), m), load(tile.weight + j));
    put(p.row_m, j, m);
    put(p.row_sum, j, sum);
    put(p.row_loss, j, tile.is_counted(j) ? loss : Vec<T>{});
  }
}

template <class T>
inline void bwd_column_rows(const CrossEntropyParams& p, int64_t row, int64_t count, const Logits<T, false>& logits,
                            ColumnTile<T>& tile) {
  using A = Acc<T>;
  const bool copied = tile.logits != nullptr;
  const T* x = copied ? tile.logits.get() : static_cast<const T*>(p.input) + row_offset(p.rows, row);
  if (!copied) {  // else forward has just left them there
    std::memcpy(tile.m, static_cast<const A*>(p.row_m) + row, count * sizeof(A));
    std::memcpy(tile.sum, static_cast<const A*>(p.row_sum) + row, count * sizeof(A));
  }
  grad_scales<T>(p, row, count, tile.m, tile.sum, tile.weight, tile.weight, tile.scale, tile.shift, nullptr);
  bwd_columns(x, copied ? tile.width : p.rows.stride_n, static_cast<T*>(p.grad_input) + row_offset(p.grad_rows, row),
              p.grad_rows.stride_n, p.rows.n, count, logits, tile);
}

template <class T, bool kForward, bool kBackward>
void rows_of_columns(const CrossEntropyParams& p, int64_t begin, int64_t end) {
  const Logits<T, false> logits(p.transform);
  ColumnTile<T> tile(p.rows.n, kForward && kBackward);
  for (int64_t row = begin, count; row < end; row += count) {
    count = std::min<int64_t>({tile.width, end - row, p.rows.inner - row % p.rows.inner});
    set_targets(p, row, count, tile);
    if (kForward) fwd_column_rows(p, row, count, logits, tile);
    if (kBackward) bwd_column_rows(p, row, count, logits, tile);
  }
}
