// Rows of any layout and dtype as contiguous rows of another type, a few at a time. [per ISA]
#if defined(TSE_STAGED_ROWS_INL_H) == defined(TSE_ISA_TOGGLE)
#ifdef TSE_STAGED_ROWS_INL_H
#undef TSE_STAGED_ROWS_INL_H
#else
#define TSE_STAGED_ROWS_INL_H
#endif
#include "common/cpu/rows-inl.h"

template <class X, class Y>
inline void convert_row(const X* x, Y* y, int64_t n) {
  if constexpr (std::is_same_v<Acc<X>, Acc<Y>>) {
    constexpr int kLanes = Accumulate<X>::kLanes;
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) store(y + i, load(x + i));
    if (i < n) store_part(y + i, n - i, load_part(x + i, n - i, Acc<X>(0)));
  } else {
    for (int64_t i = 0; i < n; ++i) store_one(y + i, Acc<Y>(load_one(x + i)));
  }
}

template <class X, class Y>
inline void convert_rows(const X* x, const Rows& from, Y* y, const Rows& to, int64_t n, int64_t count) {
  if (from.stride_n == 1 && to.stride_n == 1) {
    for (int64_t i = 0; i < count; ++i) convert_row(x + i * from.stride_inner, y + i * to.stride_inner, n);
  } else if constexpr (std::is_same_v<Acc<X>, Acc<Y>>) {
    copy_rows(x, from, y, to, n, count);
  } else {
    for (int64_t i = 0; i < count; ++i)
      for (int64_t c = 0; c < n; ++c)
        store_one(y + i * to.stride_inner + c * to.stride_n,
                  Acc<Y>(load_one(x + i * from.stride_inner + c * from.stride_n)));
  }
}

template <class X, class A>
inline void read_rows(const void* x, const Rows& rows, int64_t row, int64_t count, A* to, const Rows& of_tile) {
  convert_rows(static_cast<const X*>(x) + row_offset(rows, row), rows, to, of_tile, rows.n, count);
}
template <class Y, class A>
inline void write_rows(const A* from, const Rows& of_tile, void* y, const Rows& rows, int64_t row, int64_t count) {
  convert_rows(from, of_tile, static_cast<Y*>(y) + row_offset(rows, row), rows, rows.n, count);
}

template <class A>
constexpr DType kDType = std::is_same_v<A, double> ? DType::kFloat64 : DType::kFloat32;

constexpr int64_t kStaged = 4;  // tiles of one call, at most

// A tensor's rows, a few at a time, as contiguous rows of A: its own, or copies.
template <class A>
struct StagedRows {
  void* data;
  const Rows& rows;
  DType dtype;
  bool direct;
  Tile<A> tile;

  StagedRows(const void* data, const Rows& rows, DType dtype, int64_t most, bool may_be_direct = true)
      : data(const_cast<void*>(data)),
        rows(rows),
        dtype(dtype),
        direct(may_be_direct && dtype == kDType<A> && rows.stride_n == 1),
        tile(direct ? 0 : rows.n, most, kStaged) {}

  A* first(int64_t row) const { return direct ? static_cast<A*>(data) + row_offset(rows, row) : tile.first(); }
  Rows shape(int64_t count) const { return {1, rows.n, count, 0, 1, direct ? rows.stride_inner : tile.stride}; }
  void read(int64_t row, int64_t count) const {
    if (!direct) TSE_BY_DTYPE(dtype, read_rows, data, rows, row, count, tile.first(), shape(count))
  }
  void write(int64_t row, int64_t count) const {
    if (!direct) TSE_BY_DTYPE(dtype, write_rows, tile.first(), shape(count), data, rows, row, count)
  }
};

// Calls f(row, count) for runs of rows that have one stride, at most `most` of them.
template <class F>
inline void for_runs(const Rows& rows, int64_t begin, int64_t end, int64_t most, const F& f) {
  for (int64_t row = begin, count; row < end; row += count) {
    count = std::min({most, end - row, rows.inner - row % rows.inner});
    f(row, count);
  }
}
#endif
