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

// Σ exp2(x · L - m).
template <class T>
inline Acc<T> block_sum(const T* x, int64_t n, Acc<T> m) {
  using A = Acc<T>;
  constexpr int kLanes = Accumulate<T>::kLanes;
  const Vec<T> reference = splat<Vec<T>>(m);
  const auto term = [reference](Vec<T> v) { return exp2(exponent(v, reference)); };
  Vec<T> s0 = {}, s1 = {}, s2 = {}, s3 = {};
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
    const Pair<Vec<T>> v = load2(x + i), w = load2(x + i + 2 * kLanes);
    s0 += term(v.a);
    s1 += term(v.b);
    s2 += term(w.a);
    s3 += term(w.b);
  }
  for (; i < n; i += kLanes)
    s0 += term(i + kLanes <= n ? load(x + i) : load_part(x + i, n - i, -std::numeric_limits<A>::infinity()));
  return reduce_add((s0 + s1) + (s2 + s3));
}

// One block's sum, against the row's reference where that serves, else against its own.
template <class T>
inline BlockSum block_exp_sum(const T* x, int64_t n, Acc<T> row_reference) {
  using A = Acc<T>;
  const A low = -std::numeric_limits<A>::infinity();
  if (row_reference != low) {
    const A sum = block_sum(x, n, row_reference);
    if (sum <= A(16 * kBlock)) return {double(row_reference), double(sum)};
  }
  const A m = reference_of(x, n);
  if (m != low) return {double(m), double(block_sum(x, n, m))};
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
  return exp2(exponent(splat<Vec<T>>(load_one(x)), splat<Vec<T>>(m)))[0];
}

// A row's m and sum as backward finds them.
template <class A>
struct RowSum {
  A m, sum;
  RowSum(const CrossEntropyParams& p, int64_t row)
      : m(static_cast<const A*>(p.row_m)[row]), sum(static_cast<const A*>(p.row_sum)[row]) {}
  A at_target(A term, A factor) const { return A((double(term) / double(sum) - 1) * double(factor)); }
};

// The gradient of elements [begin, end) of a row.
template <class T>
inline void grad_row(const T* x, T* g, int64_t begin, int64_t end, int64_t target, RowSum<Acc<T>> s, Acc<T> factor) {
  using A = Acc<T>;
  constexpr int kLanes = Accumulate<T>::kLanes;
  const bool mine = target >= begin && target < end;
  const A at_target = mine ? s.at_target(term_of(x + target, s.m), factor) : A(0);  // g may be x
  const Vec<T> m = splat<Vec<T>>(s.m);
  const auto value = [m, scale = factor / s.sum](Vec<T> v) { return exp2(exponent(v, m)) * scale; };
  int64_t i = begin;
  for (; i + 2 * kLanes <= end; i += 2 * kLanes) {
    const Pair<Vec<T>> v = load2(x + i);
    store2(g + i, {value(v.a), value(v.b)});
  }
  for (; i + kLanes <= end; i += kLanes) store(g + i, value(load(x + i)));
  if (i < end) store_part(g + i, end - i, value(load_part(x + i, end - i, A(0))));
  if (mine) store_one(g + target, at_target);
}

// ---- the class dimension is not the last one: the lanes of vectors are neighbouring rows --------------------------
//
// Columns are walked in tiles of up to kColumns, class by class, so that memory is read in runs. Forward keeps the
// tile: classes lie a power of two apart as often as not, and would push each other out of the cache.

constexpr int64_t kColumns = 2048;
constexpr int64_t kTileElements = 65536;  // of the copy: half of L2 in fp32

template <class T>
struct ColumnTile {
  int64_t width;  // a multiple of the lanes
  std::unique_ptr<T[]> logits;  // (n, width)
  alignas(64) Acc<T> m[kColumns], sum[kColumns];
  alignas(64) Acc<T> factor[kColumns];
  alignas(64) Acc<T> at_target[kColumns];  // the target's logit, then the gradient there
  alignas(64) Acc<T> keep[kColumns];  // all bits set, or none where the target is ignored

  ColumnTile(int64_t n, bool forward)
      : width(std::clamp<int64_t>(kTileElements / std::max<int64_t>(n, 1), Accumulate<T>::kLanes, kColumns) /
              Accumulate<T>::kLanes * Accumulate<T>::kLanes),
        logits(forward ? new T[n * width]() : nullptr) {}
};

template <class T>
inline void fwd_columns(const T* x, int64_t n, int64_t stride, int64_t count, ColumnTile<T>& tile) {
  using A = Acc<T>;
  constexpr int kLanes = Accumulate<T>::kLanes;
  const A low = -std::numeric_limits<A>::infinity();
  for (int64_t j = 0; j < count; j += kLanes) {
    store(tile.m + j, splat<Vec<T>>(low));
    store(tile.sum + j, Vec<T>{});
  }
  for (int64_t c = 0; c < n; ++c) {
    T* row = &tile.logits[c * tile.width];
    if (c + 1 < n) prefetch(x + (c + 1) * stride, count);  // the hardware's prefetcher does not see this far
    std::memcpy(row, x + c * stride, count * sizeof(T));
    for (int64_t j = 0; j < count; j += kLanes) store(tile.m + j, vmax(load(row + j), load(tile.m + j)));
  }
  for (int64_t j = 0; j < count; ++j) tile.m[j] = tile.m[j] == low ? A(0) : std::ceil(tile.m[j] * kLog2e<A>);
  for (int64_t c = 0; c < n; ++c) {
    const T* row = &tile.logits[c * tile.width];
    for (int64_t j = 0; j < count; j += kLanes)
      store(tile.sum + j, load(tile.sum + j) + exp2(exponent(load(row + j), load(tile.m + j))));
  }
}

// Writes the gradient of `count` columns, whose tile.sum has become factor / sum; x may be the tile's own copy.
template <class T>
inline void bwd_columns(const T* x, int64_t stride, T* g, int64_t grad_stride, int64_t n, int64_t count,
                        const ColumnTile<T>& tile) {
  constexpr int kLanes = Accumulate<T>::kLanes;
  const auto value = [&](Vec<T> v, int64_t j) {
    const Vec<T> p = exp2(exponent(v, load(tile.m + j))) * load(tile.sum + j);
    return bits_and(p, load(tile.keep + j));  // an ignored row's gradient is 0 even where its logits are not finite
  };
  for (int64_t c = 0; c < n; ++c) {
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

template <class T>
inline void finish_row_grad(const CrossEntropyParams& p, int64_t row, int64_t begin, int64_t end) {
  const T* x = static_cast<const T*>(p.input) + row_offset(p.rows, row);
  T* g = static_cast<T*>(p.grad_input) + row_offset(p.grad_rows, row);
  const int64_t target = target_of(p, row);
  if (target == p.ignore_index) std::fill(g + begin, g + end, T{});
  else grad_row(x, g, begin, end, target, RowSum<Acc<T>>(p, row), factor_of<Acc<T>>(p, row));
}

// What is per row is done for all rows of the tile at once, too: with few classes it is most of the work.
template <class T>
inline void find_targets(const CrossEntropyParams& p, int64_t row, int64_t count, const T* x, int64_t stride,
                         ColumnTile<T>& tile) {
  for (int64_t i = 0; i < count; ++i) {
    const int64_t target = target_of(p, row + i);
    const bool counted = target != p.ignore_index;
    tile.at_target[i] = counted ? load_one(x + target * stride + i) : Acc<T>(0);
    std::memset(&tile.keep[i], counted ? 0xff : 0, sizeof(Acc<T>));
  }
}

template <class T>
inline void fwd_column_rows(const CrossEntropyParams& p, int64_t row, int64_t count, ColumnTile<T>& tile) {
  using A = Acc<T>;
  constexpr int kLanes = Accumulate<T>::kLanes;
  fwd_columns(static_cast<const T*>(p.input) + row_offset(p.rows, row), p.rows.n, p.rows.stride_n, count, tile);
  find_targets(p, row, count, tile.logits.get(), tile.width, tile);
  const auto put = [&](void* array, int64_t j, Vec<T> v) {
    A* to = static_cast<A*>(array) + row + j;
    if (j + kLanes <= count) store(to, v);
    else store_part(to, count - j, v);
  };
  for (int64_t j = 0; j < count; j += kLanes) {
    const Vec<T> m = load(tile.m + j), sum = load(tile.sum + j), t = exponent(load(tile.at_target + j), m);
    const Vec<T> term = exp2(t);
    const auto likely = term > sum * A(0.25);
    const Vec<T> loss = log2(likely ? sum / term : sum) - (likely ? Vec<T>{} : t);
    put(p.row_m, j, m);
    put(p.row_sum, j, sum);
    put(p.row_loss, j, bits_and(vmax(Vec<T>{}, loss) * kLn2<A>, load(tile.keep + j)));
  }
}

template <class T>
inline void bwd_column_rows(const CrossEntropyParams& p, int64_t row, int64_t count, ColumnTile<T>& tile) {
  using A = Acc<T>;
  constexpr int kLanes = Accumulate<T>::kLanes;
  T* g = static_cast<T*>(p.grad_input) + row_offset(p.grad_rows, row);
  const bool copied = tile.logits != nullptr;
  const T* x = copied ? tile.logits.get() : static_cast<const T*>(p.input) + row_offset(p.rows, row);
  const int64_t n = p.rows.n, stride = copied ? tile.width : p.rows.stride_n, grad_stride = p.grad_rows.stride_n;
  if (!copied) {  // else forward has just left them there
    std::memcpy(tile.m, static_cast<const A*>(p.row_m) + row, count * sizeof(A));
    std::memcpy(tile.sum, static_cast<const A*>(p.row_sum) + row, count * sizeof(A));
    find_targets(p, row, count, x, stride, tile);
  }
  std::fill_n(tile.factor, count, factor_of<A>(p, row));
  if (p.grad_output_stride != 0)
    for (int64_t i = 0; i < count; ++i) tile.factor[i] = factor_of<A>(p, row + i);
  for (int64_t j = 0; j < count; j += kLanes) {
    const Vec<T> sum = load(tile.sum + j), factor = load(tile.factor + j);
    const Vec<T> term = exp2(exponent(load(tile.at_target + j), load(tile.m + j)));
    store(tile.at_target + j, (term - sum) / sum * factor);
    store(tile.sum + j, factor / sum);
  }
  bwd_columns(x, stride, g, grad_stride, n, count, tile);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t target = target_of(p, row + i);
    if (target != p.ignore_index) store_one(g + target * grad_stride + i, tile.at_target[i]);
  }
}

template <class T, bool kForward, bool kBackward>
void rows(const CrossEntropyParams& p, int64_t begin, int64_t end) {
  const int64_t n = p.rows.n;
  if (p.rows.stride_n == 1 && (!kBackward || p.grad_rows.stride_n == 1)) {
    for (int64_t row = begin; row < end; ++row) {
      const T* x = static_cast<const T*>(p.input) + row_offset(p.rows, row);
      // The logits of an ignored row are not even read.
      const bool counted = target_of(p, row) != p.ignore_index;
      if (kForward) finish_row(p, row, counted ? row_exp_sum(x, n) : kNothing, x);
      if (kBackward) finish_row_grad<T>(p, row, 0, n);
    }
    return;
  }
  ColumnTile<T> tile(n, kForward);
  for (int64_t row = begin; row < end;) {
    const int64_t count = std::min<int64_t>({tile.width, end - row, p.rows.inner - row % p.rows.inner});
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
  finish_row_grad<T>(p, row, begin * kBlock, std::min(end * kBlock, p.rows.n));
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
