// Sparsemax rows on the CPU. [per ISA]
//
// p = max(x - tau, 0) with Σ p = 1 (Martins & Astudillo 2016). tau without sorting: Newton's (= Michelot's) step from
// below, tau ← tau + (Σ (x - tau)_+ - 1) / #{x > tau}, ends exactly when the support stops changing, and what a step
// leaves behind never comes back. Short rows take these steps together; of long ones a bound is found while they are
// read, so that mostly few elements are left, and the result is zeros with some elements set. From memory a row is read
// once and written once. All is relative to the largest element, and tau is held as the sum of two numbers: in a
// support of 10^5 elements of 10^-5 the rounding of tau alone would show in Σ p. NaN and +inf make the sum NaN, and so
// tau and the row.
#if defined(TSE_SPARSEMAX_CPU_INL_H) == defined(TSE_ISA_TOGGLE)
#ifdef TSE_SPARSEMAX_CPU_INL_H
#undef TSE_SPARSEMAX_CPU_INL_H
#else
#define TSE_SPARSEMAX_CPU_INL_H
#endif
#include "common/cpu/row_map-inl.h"
#include "sparsemax/sparsemax_newton-inl.h"
#include "sparsemax/sparsemax_short-inl.h"

// Elements of a row that may be in the support, at most kMost, with room for a vector after them; and the maxima of all
// parts of the row. Elements of a part are looked through together; each lane has the largest of its own.
constexpr int64_t kPart = 256, kMostParts = 4096;
template <class A>
struct Candidates {
  static constexpr int64_t kMost = 65536;
  int64_t part, room;  // elements of a part; candidates that fit, besides those of a part
  std::unique_ptr<A[]> values, maxima;
  std::unique_ptr<uint32_t[]> indices;
  explicit Candidates(int64_t n)
      : part(kPart * std::max<int64_t>(1, (n + kPart * kMostParts - 1) / (kPart * kMostParts))),
        room(std::min(n, kMost)),
        values(new A[room + std::max(part, kSumBlock) + kFloats]),
        maxima(new A[(n / part + 1) * kFloats]),
        indices(new uint32_t[room + std::max(part, kSumBlock) + kFloats]) {}
};

// Reads a row once: the largest element of each lane of each part, NaN aside, and the sum, NaN if there is one.
// Meanwhile y gets the zeros that most of it will be: reading and writing at once are faster than one after the other.
template <class T, class Team>
inline double read_and_zero(const T* x, T* y, int64_t n, int64_t part, Acc<T>* maxima, Team team) {
  using V = Vec<T>;
  constexpr int kLanes = Accumulate<T>::kLanes;
  const V low = splat<V>(-std::numeric_limits<Acc<T>>::infinity());
  const auto of_block = [&](int64_t first, int64_t last) {
    V sum = {};
    for (int64_t begin = first; begin < last; begin += part) {
      const int64_t size = std::min(part, last - begin);
      V m[4] = {low, low, low, low}, s[4] = {};
      const auto add = [&](V v, int k) { m[k] = vmax(v, m[k]), s[k] += v; };
      const auto add_pair = [&](int k, int64_t i, Pair<V> v) {
        add(v.a, k), add(v.b, k + 1);
        if (i + 2 * kLanes <= size) store2(y + begin + i, {V{}, V{}});
        else std::fill_n(y + begin + i, size - i, T{});
      };
      for_pairs<4>(size, low[0], add_pair, x + begin);
      store(maxima + begin / part * kLanes, vmax(vmax(m[0], m[1]), vmax(m[2], m[3])));
      sum += (s[0] + s[1]) + (s[2] + s[3]);
    }
    return double(reduce_add(sum));
  };
  return reduce_row(team, n, 16 * part, 0.0, of_block, std::plus<>());
}

// A row of more than kShort elements.
template <class T, class Team>
inline void long_row(const T* x, T* y, int64_t n, Candidates<Acc<T>>& c, Team team) {
  using A = Acc<T>;
  constexpr int kLanes = Accumulate<T>::kLanes;
  const double sum = read_and_zero(x, y, n, c.part, c.maxima.get(), team);
  const int64_t parts = (n + c.part - 1) / c.part * kLanes;
  const A max = block_max(c.maxima.get(), parts);
  if (max == -std::numeric_limits<A>::infinity() && sum == sum) return;
  // tau of the maxima is a lower bound, and a close one; it need not be exact.
  const Excess e = newton(c.maxima.get(), parts, max, -1, /*tolerance=*/0.1);
  const auto as_flat = [&] {
    FlatRow<T> row{x, y, max, e.step()};
    flat_rows(&row, 1, n, team);
  };
  if (e.count > parts - parts / 16 || sum != sum || n > std::numeric_limits<uint32_t>::max()) return as_flat();
  A bound = A(double(max) + e.step());
  bound -= std::abs(bound) * std::numeric_limits<A>::epsilon();  // rounding costs a candidate too many, not one too few
  int64_t count = 0;
  for (int64_t begin = 0, lanes = 0; begin < n; begin += c.part, lanes += kLanes) {
    if (mask_above(load(&c.maxima[lanes]), bound) == 0) continue;
    if (count > c.room) return as_flat();
    count += collect_above(x, begin, std::min(begin + c.part, n), bound, &c.values[count], &c.indices[count]);
  }
  store(&c.values[count], splat<Vec<A>>(-std::numeric_limits<A>::infinity()));  // whole vectors
  const int64_t filled = (count + kLanes - 1) / kLanes * kLanes;
  const Threshold<A> t = threshold(max, newton(c.values.get(), filled, max, e.step()).step());
  for (int64_t j = 0; j < count; ++j) store_one(y + c.indices[j], std::max(t.excess(c.values[j]), A(0)));
}

// grad_input = g - mean of g over the support on the support, 0 elsewhere; NaN where p is NaN, as all of a row is.

// How many elements have p > 0, and Σ g over them. Blocks of elements are summed in the type, the blocks in double.
struct Support {
  double sum, count;
  double mean() const { return sum / count; }
};

// For a row whose support is small: p is read once while zeros are written, g only at the support. Its sums have the
// bits of dense_bwd_row's. Returns false, and leaves the row to dense_bwd_row, from about one element in 64 on.
template <class T>
inline bool sparse_bwd_row(const T* p, const T* g, T* out, int64_t n, Candidates<Acc<T>>& c) {
  using A = Acc<T>;
  constexpr int kPair = 2 * Accumulate<T>::kLanes;
  Support support = {0, 0};
  int64_t count = 0;
  for (int64_t begin = 0; begin < n; begin += kSumBlock) {
    if (count > std::min(c.room, kSumBlock / 4 + begin / 64)) return false;
    const int64_t end = std::min(begin + kSumBlock, n);
    const int64_t found = collect_above(p, begin, end, A(0), &c.values[count], &c.indices[count]);
    std::fill_n(out + begin, end - begin, T{});
    if (found == 0) continue;
    Vec<T> sums[2] = {};
    for (const int64_t last = count + found; count < last; ++count) {
      const int slot = slot_of<T>(int(c.indices[count] - begin) % kPair);
      c.values[count] = load_one(g + c.indices[count]);
      sums[slot >= kPair / 2][slot % (kPair / 2)] += c.values[count];
    }
    support.sum += double(reduce_add(sums[0] + sums[1]));
  }
  support.count = double(count);
  const A mean = A(support.mean());
  for (int64_t j = 0; j < count; ++j) store_one(out + c.indices[j], c.values[j] - mean);
  return true;
}

// For any row: p and g are read twice, the second time from cache. Of a row that threads share, blocks without support
// are zeroed in the first pass and not read again.
template <class T, class Team>
inline void dense_bwd_row(const T* p, const T* g, T* out, int64_t n, Team team) {
  using A = Acc<T>;
  using V = Vec<T>;
  constexpr bool is_shared = !std::is_same_v<Team, Alone>;
  const std::unique_ptr<bool[]> is_empty(is_shared ? new bool[n / kSumBlock + 1] : nullptr);
  const auto support_of = [&](int64_t begin, int64_t end) {
    if constexpr (is_shared) {
      is_empty[begin / kSumBlock] = !any_above(p + begin, end - begin, A(0));
      if (is_empty[begin / kSumBlock]) return std::fill_n(out + begin, end - begin, T{}), Support{0, 0};
    }
    SumAbove<V> above[2];
    const auto add = [&](int, int64_t, Pair<V> pv, Pair<V> gv) {
      above[0].add(gv.a, pv.a <= V{});
      above[1].add(gv.b, pv.b <= V{});
    };
    const int vectors = for_pairs<2>(end - begin, A(0), add, p + begin, g + begin);
    const SumAbove<V> all = above[0] + above[1];
    const auto lanes = __builtin_convertvector(all.count(vectors), V);
    return Support{double(reduce_add(all.sum)), double(reduce_add(lanes))};
  };
  const Support support = reduce_row(team, n, kSumBlock, Support{0, 0}, support_of,
                                     [](Support a, Support b) { return Support{a.sum + b.sum, a.count + b.count}; });
  const A first = n > 0 ? load_one(p) : A(0), mean = A(support.mean()) + (first - first);  // NaN like the row
  const auto value = [mean](V pv, V gv) { return pv <= V{} ? V{} : gv - mean; };
  for_parts(team, n, kSumBlock, [&](int64_t begin, int64_t end) {
    if constexpr (!is_shared) return map_row(out, n, value, p, g);
    for (int64_t i = begin; i < end; i += kSumBlock)
      if (!is_empty[i / kSumBlock]) map_row(out + i, std::min(kSumBlock, end - i), value, p + i, g + i);
  });
}

template <class T, class Team>
inline void sparsemax_bwd_row(Team team, T* out, const T* p, const T* g, int64_t n, Candidates<Acc<T>>& c) {
  if constexpr (std::is_same_v<Team, Alone>)
    if (n > kSumBlock && n <= std::numeric_limits<uint32_t>::max() && sparse_bwd_row(p, g, out, n, c)) return;
  dense_bwd_row(p, g, out, n, team);
}

// ---- rows ---------------------------------------------------------------------------------------------------------

template <class T>
void fwd_rows(const RowMapParams& p, int64_t begin, int64_t end) {
  const int64_t n = p.rows.n;
  Candidates<Acc<T>> candidates(n > kShort ? n : 0);
  for_forward_rows<T>(p, begin, end, [&](auto team, int64_t first, int64_t last, const auto& y, const auto& x) {
    if (n <= kShort) return short_rows<T>(x, y, first, last, n);
    for (int64_t i = first; i < last; ++i) long_row(x(i), y(i), n, candidates, team);
  });
}

template <class T>
void bwd_rows(const RowMapParams& p, int64_t begin, int64_t end) {
  const int64_t n = p.output_rows.n;
  Candidates<Acc<T>> candidates(n > kSumBlock ? n : 0);
  for_each_backward_row<T>(p, begin, end, [&](auto team, int64_t, T* out, const T* output, const T* g) {
    sparsemax_bwd_row(team, out, output, g, n, candidates);
  });
}

void sparsemax_fwd_rows(const RowMapParams& p, int64_t begin, int64_t end) {
  TSE_BY_DTYPE(p.dtype, fwd_rows, p, begin, end)
}
void sparsemax_bwd_rows(const RowMapParams& p, int64_t begin, int64_t end) {
  TSE_BY_DTYPE(p.dtype, bwd_rows, p, begin, end)
}
#endif
