// The two ways to walk rows. [per ISA]
//
// row: one contiguous row after another, two vectors at a time.
// lanes: kLanes rows at once, one in each lane of a vector, class by class; in any layout. Best for short rows, where
// the work per row dominates, and for images, where a vector of one class of consecutive pixels is contiguous.
// Operators that only have the row walk copy other layouts into contiguous rows, a Tile at a time.
#if defined(TSE_ROWS_INL_H) == defined(TSE_ISA_TOGGLE)
#ifdef TSE_ROWS_INL_H
#undef TSE_ROWS_INL_H
#else
#define TSE_ROWS_INL_H
#endif
#include "common/cpu/lanes-inl.h"

// ---- row ------------------------------------------------------------------------------------------------------------

constexpr int64_t kSumBlock = 1024;  // elements whose sum is taken in Acc<T>; sums of blocks are in double

// The vector v in the lanes `used`, else 0.
struct AllLanes {};
template <class V>
inline V chosen(AllLanes, V v) {
  return v;
}
template <class Lanes, class V>
inline V chosen(Lanes used, V v) {
  return used ? v : V{};
}

// Calls add(k, v, i, used) for the vectors v of a row: `used` are the lanes that count, all but those after the row's
// end, which hold -inf, and the element `own`, if there is one. k is the sum, one of four, that v belongs to. Vectors k
// and k + 1 are those of load2 at i.
template <class T, class Add>
[[gnu::always_inline]] inline void for_vectors(const T* x, int64_t n, int64_t own, const Add& add) {
  constexpr int kLanes = Accumulate<T>::kLanes, kPair = 2 * kLanes, kGroup = 2 * kPair;
  const auto whole = [&](int k, int64_t i) {
    const Pair<Vec<T>> v = load2(x + i);
    add(k, v.a, i, AllLanes{});
    add(k + 1, v.b, i, AllLanes{});
  };
  const auto without_own = [&](int k, int64_t i) __attribute__((always_inline)) {
    const int64_t count = std::min<int64_t>(kPair, n - i);
    const Pair<Vec<T>> v =
        count == kPair ? load2(x + i) : load2_part(x + i, count, -std::numeric_limits<Acc<T>>::infinity());
    const auto at = pair_numbers<T>();
    using Number = decltype(at.a[0] + 0);
    const Number end = count, excluded = own - i;
    add(k, v.a, i, (at.a < end) & (at.a != excluded));
    add(k + 1, v.b, i, (at.b < end) & (at.b != excluded));
  };
  if (own < 0 || own >= n) own = -kGroup;
  const int64_t groups = n / kGroup * kGroup, special = own < 0 || own >= groups ? groups : own / kGroup * kGroup;
  int64_t i = 0;
  for (; i < special; i += kGroup) whole(0, i), whole(2, i + kPair);
  if (special < groups) {
    without_own(0, i), without_own(2, i + kPair);
    for (i += kGroup; i < groups; i += kGroup) whole(0, i), whole(2, i + kPair);
  }
  if (i < n) without_own(0, i);
  if (i + kPair < n) without_own(2, i + kPair);
}

// Element i of a row is added to lane slot % kLanes of sum slot / kLanes: vectors of load2 are added to sums in turn.
template <class T>
inline int slot_of(int i) {
  constexpr int kLanes = Accumulate<T>::kLanes, kPair = 2 * kLanes;
  if constexpr (!kEvenOdd<T>) return i;
  return i / kPair * kPair + (i & 1) * kLanes + i % kPair / 2;
}

// Vectors as for_vectors hands them out, kept for a second walk; room for a whole pair at the end.
template <class A>
struct Kept {
  const A* p;
  Kept operator+(int64_t i) const { return {p + i}; }
};
template <class A>
inline auto load2(Kept<A> kept) {
  return load2(kept.p);
}
template <class A, class Fill>
inline auto load2_part(Kept<A> kept, int64_t, Fill) {
  return load2(kept.p);
}

// Calls f(k, i, v…) for all elements of rows, where each v is the pair of load2 at element i of its row, `fill` after
// the end, and its vectors belong to sums k and k + 1 of kSums, 2 or 4. Returns the number of vectors. k is a literal
// in each call: with one that is counted up, the compiler keeps the sums in memory.
template <int kSums, class F, class T, class... X>
[[gnu::always_inline]] inline int for_pairs(int64_t n, Acc<T> fill, const F& f, const T* first, const X*... x) {
  constexpr int64_t kPair = 2 * Accumulate<T>::kLanes, kStep = kSums / 2 * kPair;
  const auto whole = [&](int k, int64_t i) { f(k, i, load2(first + i), load2(x + i)...); };
  int64_t i = 0;
  for (; i + kStep <= n; i += kStep) {
    whole(0, i);
    if constexpr (kSums == 4) whole(2, i + kPair);
  }
  if (kSums == 4 && i + kPair <= n) whole(0, i), i += kPair;
  if (i < n) f(0, i, load2_part(first + i, n - i, fill), load2_part(x + i, n - i, fill)...);
  return int((n + kPair - 1) / kPair) * 2;
}

// Max of `x`, NaN aside.
template <class T>
inline Acc<T> block_max(const T* x, int64_t n) {
  const Acc<T> low = -std::numeric_limits<Acc<T>>::infinity();
  const Vec<T> none = splat<Vec<T>>(low);
  Vec<T> m[4] = {none, none, none, none};
  for_pairs<4>(n, low, [&](int k, int64_t, auto v) { m[k] = vmax(v.a, m[k]), m[k + 1] = vmax(v.b, m[k + 1]); }, x);
  return reduce_max(vmax(vmax(m[0], m[1]), vmax(m[2], m[3])));
}

// y[i] = f(x[i]…), by vectors; inputs are rows or Kept.
template <class T, class F, class... X>
[[gnu::always_inline]] inline void map_row(T* y, int64_t n, const F& f, const X... x) {
  constexpr int kPair = 2 * Accumulate<T>::kLanes;
  const auto both = [&](auto... v) { return Pair<Vec<T>>{f(v.a...), f(v.b...)}; };
  int64_t i = 0;
  for (; i + kPair <= n; i += kPair) store2(y + i, both(load2(x + i)...));
  if (i < n) store2_part(y + i, n - i, both(load2_part(x + i, n - i, Acc<T>(0))...));
}

// ---- tiles ----------------------------------------------------------------------------------------------------------

constexpr int64_t kTileElements = 32768;  // of a tile: a part of L2
constexpr int64_t kTileBytes = 2 << 20;  // of all tiles of a thread, unless one row alone takes more

// Rows that are not contiguous, for kernels that need contiguous ones: several at a time are copied here, or from here.
template <class T>
struct Tile {
  struct alignas(64) Line {  // of cache
    char bytes[64];
  };
  static constexpr int kLanes = Accumulate<T>::kLanes;
  static constexpr int64_t kInLine = sizeof(Line) / sizeof(T);
  int64_t stride, rows;  // rows: so many at once
  std::unique_ptr<Line[]> memory;

  // Room for so many rows at once that they use whole lines of the tensor, too, but for no more than `most`, nor than
  // fit beside the other tiles. Rows lie an odd number of lines apart: not all in one set of the cache.
  Tile(int64_t n, int64_t most, int64_t tiles)
      : stride(stride_of(n)), rows(rows_of(n, most, tiles)), memory(new Line[rows * stride / kInLine]) {}
  static int64_t stride_of(int64_t n) { return ((n + kInLine - 1) / kInLine | 1) * kInLine; }
  static int64_t rows_of(int64_t n, int64_t most, int64_t tiles) {
    const int64_t stride = stride_of(n), fit = kTileBytes / tiles / (stride * int64_t(sizeof(T)));
    const int64_t rows =
        std::min(std::max(kInLine, kTileElements / stride / kInLine * kInLine), (most + kLanes - 1) / kLanes * kLanes);
    if (rows <= fit) return rows;
    return fit < kLanes ? std::max<int64_t>(fit, 1) : fit / kLanes * kLanes;
  }
  T* first() const { return reinterpret_cast<T*>(memory.get()); }
};

// `count` rows of n elements from one layout to another, a square of a vector's lanes at a time. In a whole square
// whose vectors lie along the rows in one layout and across them in the other, they are transposed in registers. Both
// types have the same arithmetic.
template <class T, class Y>
inline void copy_rows(const T* x, const Rows& from, Y* y, const Rows& to, int64_t n, int64_t count) {
  constexpr int kLanes = Accumulate<T>::kLanes;
  const bool gathers = from.stride_inner == 1 && to.stride_n == 1,
             scatters = from.stride_n == 1 && to.stride_inner == 1;
  const int64_t x_step = gathers ? from.stride_n : from.stride_inner, y_step = gathers ? to.stride_inner : to.stride_n;
  for (int64_t c = 0; c < n; c += kLanes) {
    for (int64_t i = 0; i < count; i += kLanes) {
      const T* in = x + c * from.stride_n + i * from.stride_inner;
      Y* out = y + c * to.stride_n + i * to.stride_inner;
      const int64_t height = std::min<int64_t>(kLanes, n - c), width = std::min<int64_t>(kLanes, count - i);
      if ((gathers || scatters) && height == kLanes && width == kLanes) {
        Vec<T> square[kLanes];
#pragma GCC unroll 16
        for (int k = 0; k < kLanes; ++k) square[k] = load(in + k * x_step);
        transpose(square);
#pragma GCC unroll 16
        for (int k = 0; k < kLanes; ++k) store(out + k * y_step, square[k]);
      } else {
        Vec<T> square[kLanes];
        load_lanes(in, from, height, width, square);
        store_lanes(out, to, height, width, square);
      }
    }
  }
}

// Row i of a tensor, or of a tile that begins with row `begin`.
template <class T>
struct RowAt {
  T* first;
  Rows rows;
  int64_t begin = 0;
  T* operator()(int64_t i) const { return first + row_offset(rows, i - begin); }
};

// Calls f(first, last, y, x…) for rows [begin, end), a part at a time, in which y(i) and x(i)… are contiguous for
// first <= i < last: the tensors' rows, or copies in tiles, of which y is written back.
template <class T, class F, class... X>
inline void for_each_row(int64_t begin, int64_t end, const F& f, const RowAt<T>& y, const X&... x) {
  const bool contiguous = y.rows.stride_n == 1 && ((x.rows.stride_n == 1) && ...);
  if (contiguous) return f(begin, end, y, x...);
  constexpr int kTiles = 1 + sizeof...(X);
  const int64_t n = y.rows.n, inner = y.rows.inner, most = std::min(inner, end - begin);
  const Tile<T> to(n, most, kTiles), from[] = {(void(x), Tile<T>(n, most, kTiles))...};
  for (int64_t row = begin, count; row < end; row += count) {
    count = std::min<int64_t>({to.rows, end - row, inner - row % inner});
    const Rows of_tile = {1, n, count, 0, 1, to.stride};
    int k = 0;
    const auto gathered = [&](const auto& x, const Tile<T>& tile) {
      copy_rows(x(row), x.rows, tile.first(), of_tile, n, count);
      return RowAt<const T>{tile.first(), of_tile, row};
    };
    const std::array<RowAt<const T>, sizeof...(X)> rows = {gathered(x, from[k++])...};
    std::apply([&](const auto&... in) { f(row, row + count, RowAt<T>{to.first(), of_tile, row}, in...); }, rows);
    copy_rows<T>(to.first(), of_tile, y(row), y.rows, n, count);
  }
}

// ---- threads --------------------------------------------------------------------------------------------------------

// One thread has the row (Alone), or all threads share its blocks (ShareRow*). Row functions take this Team as a
// template parameter: variables that other threads see stay in memory, those of one thread in registers.
struct Alone {};
template <class F>
inline void with_team(ShareRow* share_row, const F& f) {
  share_row == nullptr ? f(Alone{}) : f(share_row);
}

// Calls f(begin, end) for parts of a row that end where a block of `size` elements does.
template <class F>
inline void for_parts(Alone, int64_t n, int64_t, const F& f) {
  f(0, n);
}
template <class F>
inline void for_parts(ShareRow* share_row, int64_t n, int64_t size, const F& f) {
  const auto part = [&](int64_t begin, int64_t end) { f(begin * size, std::min(end * size, n)); };
  using Part = decltype(part);
  const auto call = [](const void* p, int64_t begin, int64_t end) { (*static_cast<Part*>(p))(begin, end); };
  share_row((n + size - 1) / size, size, call, &part);
}

// What join makes of f(begin, end) of a row's blocks of `size` elements, in their order: the same bits with any
// threads.
template <class S, class F, class Join>
[[gnu::always_inline]] inline S reduce_row(Alone, int64_t n, int64_t size, S total, const F& f, const Join& join) {
  for (int64_t i = 0; i < n; i += size) {
    const S of_block = f(i, std::min(i + size, n));
    total = i == 0 ? of_block : join(total, of_block);
  }
  return total;
}
template <class S, class F, class Join>
inline S reduce_row(ShareRow* share_row, int64_t n, int64_t size, S total, const F& f, const Join& join) {
  const std::unique_ptr<S[]> of_blocks(new S[(n + size - 1) / size]);
  for_parts(share_row, n, size, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i += size) of_blocks[i / size] = f(i, std::min(i + size, end));
  });
  for (int64_t i = 0; i < n; i += size) total = i == 0 ? of_blocks[0] : join(total, of_blocks[i / size]);
  return total;
}

// Σ f(x[i], y[i]) over a row, f(0, 0) = 0. Blocks are summed in Acc<T>, and the blocks in double.
template <class T, class Team, class F>
[[gnu::always_inline]] inline double sum_row(Team team, int64_t n, const F& f, const T* x, const T* y) {
  const auto sum_block = [&](int64_t begin, int64_t end) {
    Vec<T> sum[2] = {};
    const auto add = [&](int, int64_t, auto a, auto b) { sum[0] += f(a.a, b.a), sum[1] += f(a.b, b.b); };
    for_pairs<2>(end - begin, Acc<T>(0), add, x + begin, y + begin);
    return double(reduce_add(sum[0] + sum[1]));
  };
  return reduce_row(team, n, kSumBlock, 0.0, sum_block, std::plus<>());
}
#endif
