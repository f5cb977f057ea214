// Cross-entropy rows on the CPU. [per ISA]
//
// loss = log Σ exp(x) - x[target]; grad = (exp(x) / Σ exp(x) - [c == target]) · factor.
// Forward reads each logit once; backward reads it once more and writes the gradient once. Where the incoming gradient
// is known beforehand both happen row by row, and the second reading is from cache. Log-probabilities are never stored.
//
// exp is taken in base 2 against an integer reference m, so that x · log2(e) - m is one fused multiply-add that rounds
// only the difference, and sums with different references are joined by powers of two, without rounding. The reference
// is ≥ the maximum of the row's first elements, and all blocks keep it without looking for their own maximum: terms may
// well be above 1, and a block whose sum shows that it is not near the reference is added up again with its own.
// L = log2(e) rounded to the type stands for the base on the way there and back: only differences feel its error.
// A target that has nearly all of the probability is compared with the sum in the same arithmetic that built the sum,
// so that a loss and a gradient that must be 0 are 0.

constexpr int64_t kBlock = kCrossEntropyBlock;
constexpr int64_t kReference = 512;  // elements whose maximum is the row's reference
constexpr BlockSum kNothing = {-std::numeric_limits<double>::infinity(), 0};

inline BlockSum join(BlockSum a, BlockSum b) {
  if (b.m > a.m) std::swap(a, b);
  if (b.sum != 0) a.sum += a.m == b.m ? b.sum : b.sum * std::exp2(b.m - a.m);  // infinite m with sum 0 says nothing
  return a;
}

// Max of `x`, NaN aside.
template <class T>
inline Acc<T> block_max(const T* x, int64_t n) {
  using A = Acc<T>;
  constexpr int kLanes = Accumulate<T>::kLanes;
  const A low = -std::numeric_limits<A>::infinity();
  Vec<T> m0 = splat<Vec<T>>(low), m1 = m0;
  int64_t i = 0;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
    const Pair<Vec<T>> v = load2(x + i);
    m0 = vmax(v.a, m0);
    m1 = vmax(v.b, m1);
  }
  for (; i < n; i += kLanes) m0 = vmax(i + kLanes <= n ? load(x + i) : load_part(x + i, n - i, low), m0);
  return reduce_max(vmax(m0, m1));
}

template <class T>
inline Acc<T> reference_of(const T* x, int64_t n) {
  return std::ceil(block_max(x, n) * kLog2e<Acc<T>>);
}

// exp2(x · L - m) of elements [i, i + 2 · kLanes), ordered as load2 orders them.
template <class T>
inline Pair<Vec<T>> terms2(const T* x, Vec<T> m) {
  const Pair<Vec<T>> v = load2(x);
  return {exp2<T>(exponent(v.a, m)), exp2<T>(exponent(v.b, m))};
}

// Σ exp2(x · L - m). The terms are kept for backward if kKeep: whole pairs as terms2 gives them, then the rest.
template <bool kKeep, class T>
inline Acc<T> block_sum(const T* x, int64_t n, Acc<T> m, Acc<T>* kept) {
  using A = Acc<T>;
  constexpr int kLanes = Accumulate<T>::kLanes;
  const Vec<T> reference = splat<Vec<T>>(m);
  Vec<T> s0 = {}, s1 = {}, s2 = {}, s3 = {};
  const auto add = [&](int64_t i, Vec<T>& a, Vec<T>& b) {
    const Pair<Vec<T>> t = terms2(x + i, reference);
    if (kKeep) store(kept + i, t.a), store(kept + i + kLanes, t.b);
    a += t.a;
    b += t.b;
  };
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
    add(i, s0, s1);
    add(i + 2 * kLanes, s2, s3);
  }
  if (i + 2 * kLanes <= n) add(i, s0, s1), i += 2 * kLanes;
  for (; i < n; i += kLanes) {
    const Vec<T> v = i + kLanes <= n ? load(x + i) : load_part(x + i, n - i, -std::numeric_limits<A>::infinity());
    const Vec<T> t = exp2<T>(exponent(v, reference));
    if (kKeep) store(kept + i, t);
    s0 += t;
  }
  return reduce_add((s0 + s1) + (s2 + s3));
}

// One block's sum, against the row's reference where that serves, else against its own.
template <bool kKeep = false, class T>
inline BlockSum block_exp_sum(const T* x, int64_t n, Acc<T> row_reference, Acc<T>* kept = nullptr) {
  using A = Acc<T>;
  const A low = -std::numeric_limits<A>::infinity();
  if (row_reference != low) {
    const A sum = block_sum<kKeep>(x, n, row_reference, kept);
    if (sum <= A(16 * kBlock)) return {double(row_reference), double(sum)};
  }
  const A m = reference_of(x, n);
  if (m != low) return {double(m), double(block_sum<kKeep>(x, n, m, kept))};
  BlockSum nothing = kNothing;  // -inf adds nothing; a NaN must be seen
  for (int64_t i = 0; i < n; ++i) {
    const A v = load_one(x + i);
    if (v != v) nothing.sum = v;
  }
  return nothing;
}

template <class T>
inline BlockSum row_exp_sum(const T* x, int64_t n) {
  const Acc<T> reference = reference_of(x, std::min(kReference, n));
  BlockSum s = kNothing;
  for (int64_t i = 0; i < n; i += kBlock) s = join(s, block_exp_sum(x + i, std::min(kBlock, n - i), reference));
  return s;
}

// exp2(x · L - m), the term of one logit, with the bits that it has in the sum.
template <class T>
inline Acc<T> term_of(const T* x, Acc<T> m) {
  return exp2<T>(exponent(splat<Vec<T>>(load_one(x)), splat<Vec<T>>(m)))[0];
}

// A row's m and sum as backward finds them.
template <class A>
struct RowSum {
  A m, sum;
  RowSum(const CrossEntropyParams& p, int64_t row)
      : m(static_cast<const A*>(p.row_m)[row]), sum(static_cast<const A*>(p.row_sum)[row]) {}
  A at_target(A term, A factor) const { return A((double(term) / double(sum) - 1) * double(factor)); }
};

// The gradient of elements [begin, end) of a row: from the terms that forward kept of a row of one block, else from x.
template <bool kKept = false, class T>
inline void grad_row(const T* x, T* g, int64_t begin, int64_t end, int64_t target, RowSum<Acc<T>> s, Acc<T> factor,
                     const Acc<T>* kept = nullptr) {
  using A = Acc<T>;
  constexpr int kLanes = Accumulate<T>::kLanes;
  const bool mine = target >= begin && target < end;
  const A at_target = mine ? s.at_target(term_of(x + target, s.m), factor) : A(0);  // g may be x
  const Vec<T> m = splat<Vec<T>>(s.m), scale = splat<Vec<T>>(factor / s.sum);
  int64_t i = begin;
  for (; i + 2 * kLanes <= end; i += 2 * kLanes) {
    const Pair<Vec<T>> t = kKept ? Pair<Vec<T>>{load(kept + i), load(kept + i + kLanes)} : terms2(x + i, m);
    store2(g + i, {t.a * scale, t.b * scale});
  }
  for (; i < end; i += kLanes) {
    const bool whole = i + kLanes <= end;
    const Vec<T> v = kKept ? load(kept + i) : whole ? load(x + i) : load_part(x + i, end - i, A(0));
    const Vec<T> grad = (kKept ? v : exp2<T>(exponent(v, m))) * scale;
    if (whole) store(g + i, grad);
    else store_part(g + i, end - i, grad);
  }
  if (mine) store_one(g + target, at_target);
}

// ---- the class dimension is not the last one: the lanes of vectors are neighbouring rows --------------------------
//
// Columns are walked in tiles of up to kColumns, class by class, so that memory is read in runs. Where backward follows
// at once, forward keeps the tile: classes lie a power of two apart as often as not, and push each other out of the
// cache. For the same reason the target's logit is caught in passing, and its gradient is made in passing.

constexpr int64_t kColumns = 2048;
constexpr int kClassesAtOnce = 4;  // so many share one pass over the columns' sums
constexpr int64_t kTileElements = 65536;  // of the copy: half of L2 in fp32
template <class A>
constexpr A kLargestSum = A(0x1p64);

template <class T>
struct ColumnTile {
  using A = Acc<T>;
  using Index = std::conditional_t<sizeof(A) == 8, int64_t, int32_t>;
  int64_t width;  // a multiple of the lanes
  std::unique_ptr<T[]> logits;  // (n, width)
  alignas(64) A m[kColumns], sum[kColumns], scale[kColumns];  // scale: factor / sum
  alignas(64) A at_target[kColumns];  // the target's logit
  alignas(64) Index target[kColumns];  // -1: ignored

  ColumnTile(int64_t n, bool copied)
      : width(std::clamp<int64_t>(kTileElements / std::max<int64_t>(n, 1), Accumulate<T>::kLanes, kColumns) /
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
  }
}

// Adds classes [c, c + kClasses) to the columns' sums, and leaves a copy of their logits for backward.
template <int kClasses, class T>
inline void add_classes(const T* x, int64_t c, int64_t n, int64_t stride, int64_t count, ColumnTile<T>& tile) {
  constexpr int kLanes = Accumulate<T>::kLanes;
  T* copy = tile.logits.get();
  const int64_t ahead = c + 2 * kClasses <= n ? kClasses * stride : 0;  // farther than the hardware's prefetcher sees
  for (int64_t j = 0; j < count; j += kLanes) {
    const auto target = tile.targets(j);
    const Vec<T> m = load(tile.m + j);
    Vec<T> sum = load(tile.sum + j), at_target = load(tile.at_target + j);
    for (int k = 0; k < kClasses; ++k) {
      const T* p = x + (c + k) * stride + j;
      __builtin_prefetch(p + ahead);
      const Vec<T> v = j + kLanes <= count ? load(p) : load_part(p, count - j, Acc<T>(0));
      if (copy != nullptr) store(copy + (c + k) * tile.width + j, v);
      at_target = target == splat<decltype(+target)>(c + k) ? v : at_target;
      sum += exp2<T>(exponent(v, m));
    }
    store(tile.sum + j, sum);
    store(tile.at_target + j, at_target);
  }
}

// Σ exp2(x · L - m) of each column; false where a sum is out of range.
template <class T>
inline bool add_columns(const T* x, int64_t n, int64_t stride, int64_t count, ColumnTile<T>& tile) {
  using A = Acc<T>;
  std::fill_n(tile.sum, tile.width, A(0));
  int64_t c = 0;
  for (; c + kClassesAtOnce <= n; c += kClassesAtOnce) add_classes<kClassesAtOnce>(x, c, n, stride, count, tile);
  for (; c < n; ++c) add_classes<1>(x, c, n, stride, count, tile);
  Vec<T> outside = {};
  for (int64_t j = 0; j < count; j += Accumulate<T>::kLanes)
    outside += load(tile.sum + j) <= kLargestSum<A> ? Vec<T>{} : splat<Vec<T>>(A(1));
  return reduce_add(outside) == 0;
}

// The reference is the first class' logit: terms need not be below 1, only far from overflow, for the precision of
// floating point is the same everywhere. Columns where that does not hold get their maximum.
template <class T>
inline void fwd_columns(const T* x, int64_t n, int64_t stride, int64_t count, ColumnTile<T>& tile) {
  using A = Acc<T>;
  const A low = -std::numeric_limits<A>::infinity();
  std::fill_n(tile.m, tile.width, A(0));
  for (int64_t j = 0; j < count && n > 0; ++j) tile.m[j] = std::ceil(load_one(x + j) * kLog2e<A>);
  if (add_columns(x, n, stride, count, tile)) return;
  for (int64_t j = 0; j < count; ++j) {
    if (tile.sum[j] <= kLargestSum<A>) continue;
    A max = low;
    for (int64_t c = 0; c < n; ++c) max = std::max(max, load_one(x + c * stride + j));  // NaN aside
    tile.m[j] = max == low ? A(0) : std::ceil(max * kLog2e<A>);
  }
  add_columns(x, n, stride, count, tile);
}

// The gradient of `count` columns; x may be the tile's own copy.
template <class T>
inline void bwd_columns(const T* x, int64_t stride, T* g, int64_t grad_stride, int64_t n, int64_t count,
                        const ColumnTile<T>& tile) {
  constexpr int kLanes = Accumulate<T>::kLanes;
  for (int64_t c = 0; c < n; ++c) {
    const auto value = [&](Vec<T> v, int64_t j) {
      const Vec<T> term = exp2<T>(exponent(v, load(tile.m + j)));
      const Vec<T> grad = (term - (tile.is_target(j, c) ? load(tile.sum + j) : Vec<T>{})) * load(tile.scale + j);
      return tile.is_counted(j) ? grad : Vec<T>{};  // 0 even where the logits of an ignored row are not finite
    };
    const T* row = x + c * stride;
    T* out = g + c * grad_stride;
    int64_t j = 0;
    for (; j + kLanes <= count; j += kLanes) store(out + j, value(load(row + j), j));
    if (j < count) store_part(out + j, count - j, value(load_part(row + j, count - j, Acc<T>(0)), j));
  }
}

// ---- rows ---------------------------------------------------------------------------------------------------------

template <class A>
constexpr A kLn2 = A(1 / double(kLog2e<A>));

template <class T>
inline void finish_row(const CrossEntropyParams& p, int64_t row, const BlockSum& s, const T* x) {
  using A = Acc<T>;
  const A m = A(s.m);
  static_cast<A*>(p.row_m)[row] = m;
  static_cast<A*>(p.row_sum)[row] = A(s.sum);
  const int64_t target = target_of(p, row);
  double loss = 0;
  if (target != p.ignore_index) {
    const double t = exponent(splat<Vec<T>>(load_one(x + target)), splat<Vec<T>>(m))[0], term = term_of(x + target, m);
    loss = term > 0.25 * s.sum ? std::log2(s.sum / term) : std::log2(s.sum) - t;
    if (loss < 0) loss = 0;  // rounding of a probability next to 1
  }
  static_cast<A*>(p.row_loss)[row] = A(loss * kLn2<A>);
}

template <bool kKept = false, class T>
inline void finish_row_grad(const CrossEntropyParams& p, int64_t row, int64_t begin, int64_t end,
                            const Acc<T>* kept = nullptr) {
  const T* x = static_cast<const T*>(p.input) + row_offset(p.rows, row);
  T* g = static_cast<T*>(p.grad_input) + row_offset(p.grad_rows, row);
  const int64_t target = target_of(p, row);
  if (target == p.ignore_index) std::fill(g + begin, g + end, T{});
  else grad_row<kKept>(x, g, begin, end, target, RowSum<Acc<T>>(p, row), factor_of<Acc<T>>(p, row), kept);
}

// What is per row is done for all rows of the tile at once, too: with few classes it is most of the work.
template <class T>
inline void fwd_column_rows(const CrossEntropyParams& p, int64_t row, int64_t count, ColumnTile<T>& tile) {
  using A = Acc<T>;
  constexpr int kLanes = Accumulate<T>::kLanes;
  fwd_columns(static_cast<const T*>(p.input) + row_offset(p.rows, row), p.rows.n, p.rows.stride_n, count, tile);
  const auto put = [&](void* array, int64_t j, Vec<T> v) {
    A* to = static_cast<A*>(array) + row + j;
    if (j + kLanes <= count) store(to, v);
    else store_part(to, count - j, v);
  };
  for (int64_t j = 0; j < count; j += kLanes) {
    const Vec<T> m = load(tile.m + j), sum = load(tile.sum + j), t = exponent(load(tile.at_target + j), m);
    const Vec<T> term = exp2<T>(t);
    const auto likely = term > sum * A(0.25);
    const Vec<T> loss = log2(likely ? sum / term : sum) - (likely ? Vec<T>{} : t);
    put(p.row_m, j, m);
    put(p.row_sum, j, sum);
    put(p.row_loss, j, tile.is_counted(j) ? vmax(Vec<T>{}, loss) * kLn2<A> : Vec<T>{});
  }
}

template <class T>
inline void bwd_column_rows(const CrossEntropyParams& p, int64_t row, int64_t count, ColumnTile<T>& tile) {
  using A = Acc<T>;
  const bool copied = tile.logits != nullptr;
  const T* x = copied ? tile.logits.get() : static_cast<const T*>(p.input) + row_offset(p.rows, row);
  if (!copied) {  // else forward has just left them there
    std::memcpy(tile.m, static_cast<const A*>(p.row_m) + row, count * sizeof(A));
    std::memcpy(tile.sum, static_cast<const A*>(p.row_sum) + row, count * sizeof(A));
  }
  const A factor = factor_of<A>(p, row);
  for (int64_t i = 0; i < count; ++i)
    tile.scale[i] = (p.grad_output_stride == 0 ? factor : factor_of<A>(p, row + i)) / tile.sum[i];
  bwd_columns(x, copied ? tile.width : p.rows.stride_n, static_cast<T*>(p.grad_input) + row_offset(p.grad_rows, row),
              p.grad_rows.stride_n, p.rows.n, count, tile);
}

template <class T, bool kForward, bool kBackward>
void rows(const CrossEntropyParams& p, int64_t begin, int64_t end) {
  const int64_t n = p.rows.n;
  if (p.rows.stride_n == 1 && (!kBackward || p.grad_rows.stride_n == 1)) {
    for (int64_t row = begin; row < end; ++row) {
      const T* x = static_cast<const T*>(p.input) + row_offset(p.rows, row);
      // The logits of an ignored row are not even read.
      const bool counted = target_of(p, row) != p.ignore_index;
      if constexpr (kForward && kBackward) {
        if (counted && n <= kBlock) {
          alignas(64) Acc<T> kept[kBlock];
          const BlockSum s = block_exp_sum<true>(x, n, reference_of(x, std::min(kReference, n)), kept);
          finish_row(p, row, s, x);
          if (s.m > -std::numeric_limits<double>::infinity()) finish_row_grad<true, T>(p, row, 0, n, kept);
          else finish_row_grad<false, T>(p, row, 0, n);
          continue;
        }
      }
      if (kForward) finish_row(p, row, counted ? row_exp_sum(x, n) : kNothing, x);
      if (kBackward) finish_row_grad<false, T>(p, row, 0, n);
    }
    return;
  }
  ColumnTile<T> tile(n, kForward && kBackward);
  for (int64_t row = begin; row < end;) {
    const int64_t count = std::min<int64_t>({tile.width, end - row, p.rows.inner - row % p.rows.inner});
    set_targets(p, row, count, tile);
    if (kForward) fwd_column_rows(p, row, count, tile);
    if (kBackward) bwd_column_rows(p, row, count, tile);
    row += count;
  }
}

template <class T>
void block_sums(const CrossEntropyParams& p, int64_t row, int64_t begin, int64_t end, BlockSum* sums) {
  const T* x = static_cast<const T*>(p.input) + row_offset(p.rows, row);
  const Acc<T> reference = reference_of(x, std::min(kReference, p.rows.n));
  for (int64_t b = begin; b < end; ++b)
    sums[b] = block_exp_sum(x + b * kBlock, std::min(kBlock, p.rows.n - b * kBlock), reference);
}

template <class T>
void finish_blocks(const CrossEntropyParams& p, int64_t row, const BlockSum* sums) {
  BlockSum s = kNothing;
  for (int64_t b = 0; b * kBlock < p.rows.n; ++b) s = join(s, sums[b]);
  const T* x = static_cast<const T*>(p.input) + row_offset(p.rows, row);
  finish_row(p, row, s, x);
}

template <class T>
void bwd_blocks(const CrossEntropyParams& p, int64_t row, int64_t begin, int64_t end) {
  finish_row_grad<false, T>(p, row, begin * kBlock, std::min(end * kBlock, p.rows.n));
}

template <class T>
void fwd(const CrossEntropyParams& p, int64_t begin, int64_t end) {
  rows<T, true, false>(p, begin, end);
}
template <class T>
void bwd(const CrossEntropyParams& p, int64_t begin, int64_t end) {
  rows<T, false, true>(p, begin, end);
}
template <class T>
void fwd_bwd(const CrossEntropyParams& p, int64_t begin, int64_t end) {
  rows<T, true, true>(p, begin, end);
}

void cross_entropy_fwd_rows(const CrossEntropyParams& p, int64_t begin, int64_t end) {
  TSE_EACH_DTYPE(fwd, p, begin, end)
}
void cross_entropy_bwd_rows(const CrossEntropyParams& p, int64_t begin, int64_t end) {
  TSE_EACH_DTYPE(bwd, p, begin, end)
}
void cross_entropy_fwd_bwd_rows(const CrossEntropyParams& p, int64_t begin, int64_t end) {
  TSE_EACH_DTYPE(fwd_bwd, p, begin, end)
}
void cross_entropy_block_sums(const CrossEntropyParams& p, int64_t row, int64_t begin, int64_t end, BlockSum* sums) {
  TSE_EACH_DTYPE(block_sums, p, row, begin, end, sums)
}
void cross_entropy_finish_row(const CrossEntropyParams& p, int64_t row, const BlockSum* sums) {
  TSE_EACH_DTYPE(finish_blocks, p, row, sums)
}
void cross_entropy_bwd_blocks(const CrossEntropyParams& p, int64_t row, int64_t begin, int64_t end) {
  TSE_EACH_DTYPE(bwd_blocks, p, row, begin, end)
}
