// Rows of a map that are prepared for its kernel: logits divided by a temperature, masked, converted. [per ISA]
//
// A few rows at a time are prepared in a tile of the type of the arithmetic, and the kernel runs on the tile while it
// is in cache. So memory is still read once and written once, and the kernels know neither masks nor temperatures. Maps
// do not change where a number is added to a row, so the row's largest logit is subtracted before the division: no
// finite logit overflows.
#if defined(TSE_PREPARED_ROWS_INL_H) == defined(TSE_ISA_TOGGLE)
#ifdef TSE_PREPARED_ROWS_INL_H
#undef TSE_PREPARED_ROWS_INL_H
#else
#define TSE_PREPARED_ROWS_INL_H
#endif
#include "common/cpu/staged_rows-inl.h"

// ---- temperature and mask -------------------------------------------------------------------------------------------

// Masks: which elements of a row are kept, in a vector at i with `count` elements, and what is added to them.
template <class A>
struct NoMask {
  auto kept(int64_t, int64_t count) const {
    return lanes_before<Vec<A>>(std::min<int64_t>(count, Accumulate<A>::kLanes));
  }
  Vec<A> added(Vec<A> v, int64_t, int64_t) const { return v; }
};
template <int count>
struct Bytes {
  typedef uint8_t type __attribute__((vector_size(count)));
};
template <class A>
struct BoolMask {
  const uint8_t* mask;
  auto kept(int64_t i, int64_t count) const {
    constexpr int kLanes = Accumulate<A>::kLanes;
    typename Bytes<kLanes>::type bytes = {};
    if (count >= kLanes) std::memcpy(&bytes, mask + i, kLanes);
    else
      for (int64_t k = 0; k < count; ++k) bytes[k] = mask[i + k];
    return __builtin_convertvector(bytes, decltype(lanes_before<Vec<A>>(0))) != 0;
  }
  Vec<A> added(Vec<A> v, int64_t, int64_t) const { return v; }
};
template <class A>
struct AddedMask {
  const A* mask;
  auto kept(int64_t, int64_t count) const {
    return lanes_before<Vec<A>>(std::min<int64_t>(count, Accumulate<A>::kLanes));
  }
  Vec<A> added(Vec<A> v, int64_t i, int64_t count) const {
    return v + (count >= Accumulate<A>::kLanes ? load(mask + i) : load_part(mask + i, count, A(0)));
  }
};

// y = (x - max x) / temperature, masked. x and y may be the same.
template <class A, class Mask>
[[gnu::flatten]] inline void prepare_row(const A* x, A* y, int64_t n, A temperature, const Mask& mask) {
  using V = Vec<A>;
  constexpr int kLanes = Accumulate<A>::kLanes;
  const V low = splat<V>(-std::numeric_limits<A>::infinity());
  const auto load_at = [&](int64_t i) { return i + kLanes <= n ? load(x + i) : load_part(x + i, n - i, low[0]); };
  V max = low;
  if (temperature != 1) {
    for (int64_t i = 0; i < n; i += kLanes) max = vmax(mask.kept(i, n - i) ? load_at(i) : low, max);  // NaN aside
    max = splat<V>(reduce_max(max));
  }
  const V m = max > low ? max : V{}, divisor = splat<V>(temperature);
  for (int64_t i = 0; i < n; i += kLanes) {
    V v = load_at(i);
    if (temperature != 1) v = (v - m) / divisor;
    v = mask.kept(i, n - i) ? mask.added(v, i, n - i) : low;
    if (i + kLanes <= n) store(y + i, v);
    else store_part(y + i, n - i, v);
  }
}

// The mask of a row, contiguous.
template <class M>
inline const M* mask_row(const PreparedRowsParams& p, int64_t row, M* copy) {
  const M* const mask = static_cast<const M*>(p.mask) + p.mask_at.offset(row);
  if (p.mask_stride_n == 1) return mask;
  for (int64_t i = 0; i < p.map.rows.n; ++i) copy[i] = mask[i * p.mask_stride_n];
  return copy;
}

// ---- the rows -------------------------------------------------------------------------------------------------------

template <class A>
inline void prepared_fwd(const PreparedRowsParams& p, int64_t begin, int64_t end) {
  const int64_t n = p.map.rows.n, most = std::min(p.map.rows.inner, end - begin);
  const StagedRows<A> x(p.map.input, p.map.rows, p.input_dtype, most, /*may_be_direct=*/false);
  const StagedRows<A> y(p.map.output, p.map.output_rows, p.output_dtype, most);
  const bool reads_x = p.input_dtype == kDType<A> && p.map.rows.stride_n == 1;  // no copy before it is prepared
  const bool copies_mask = p.mask != nullptr && p.mask_stride_n != 1;
  const std::unique_ptr<A[]> mask_copy(copies_mask ? new A[n] : nullptr);
  for_runs(p.map.rows, begin, end, x.tile.rows, [&](int64_t row, int64_t count) {
    if (!reads_x) x.read(row, count);
    for (int64_t i = 0; i < count; ++i) {
      A* const to = x.tile.first() + i * x.tile.stride;
      const A* const from = reads_x ? static_cast<const A*>(p.map.input) + row_offset(p.map.rows, row + i) : to;
      const A temperature = A(temperature_within<A>(p.temperature(row + i)));
      if (p.mask == nullptr) prepare_row(from, to, n, temperature, NoMask<A>{});
      else if (p.mask_is_bool)
        prepare_row(from, to, n, temperature,
                    BoolMask<A>{mask_row(p, row + i, reinterpret_cast<uint8_t*>(mask_copy.get()))});
      else prepare_row(from, to, n, temperature, AddedMask<A>{mask_row(p, row + i, mask_copy.get())});
    }
    RowMapParams of_tile = p.map;
    of_tile.rows = x.shape(count);
    of_tile.input = x.tile.first();
    of_tile.output_rows = y.shape(count);
    of_tile.output = y.first(row);
    of_tile.first_row = row;
    of_tile.share_row = p.share_row;
    p.kernel(of_tile, 0, count);
    y.write(row, count);
  });
}

template <class A>
inline void prepared_bwd(const PreparedRowsParams& p, int64_t begin, int64_t end) {
  const RowMapParams& map = p.map;
  const int64_t n = map.output_rows.n, most = std::min(map.output_rows.inner, end - begin);
  const StagedRows<A> y(map.output, map.output_rows, p.output_dtype, most);
  const StagedRows<A> g(map.grad_output, map.grad_output_rows, p.output_dtype, most);
  const StagedRows<A> out(map.grad_input, map.grad_input_rows, p.input_dtype, most);
  for_runs(map.output_rows, begin, end, Tile<A>::rows_of(n, most, kStaged), [&](int64_t row, int64_t count) {
    y.read(row, count);
    g.read(row, count);
    RowMapParams of_tile = map;
    of_tile.output_rows = y.shape(count);
    of_tile.output = y.first(row);
    of_tile.grad_output_rows = g.shape(count);
    of_tile.grad_output = g.first(row);
    of_tile.grad_input_rows = out.shape(count);
    of_tile.grad_input = out.first(row);
    of_tile.first_row = row;
    of_tile.share_row = p.share_row;
    p.kernel(of_tile, 0, count);
    for (int64_t i = 0; i < count; ++i) {
      const Vec<A> temperature = splat<Vec<A>>(A(temperature_within<A>(p.temperature(row + i))));
      if (temperature[0] == 1) continue;
      A* const of_row = out.first(row) + i * of_tile.grad_input_rows.stride_inner;
      map_row(of_row, n, [&](Vec<A> v) { return v / temperature; }, static_cast<const A*>(of_row));
    }
    out.write(row, count);
  });
}

void prepared_fwd_rows(const PreparedRowsParams& p, int64_t begin, int64_t end) {
  p.map.dtype == DType::kFloat64 ? prepared_fwd<double>(p, begin, end) : prepared_fwd<float>(p, begin, end);
}
void prepared_bwd_rows(const PreparedRowsParams& p, int64_t begin, int64_t end) {
  p.map.dtype == DType::kFloat64 ? prepared_bwd<double>(p, begin, end) : prepared_bwd<float>(p, begin, end);
}
#endif
