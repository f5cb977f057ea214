// Rows that are not contiguous, for kernels that need contiguous ones: several rows at a time are gathered into a tile,
// or scattered from one. [per ISA]
#if defined(TSE_TILE_INL_H) == defined(TSE_ISA_TOGGLE)
#ifdef TSE_TILE_INL_H
#undef TSE_TILE_INL_H
#else
#define TSE_TILE_INL_H
#endif
#include "common/cpu/transpose-inl.h"
#include "common/cpu/vec-inl.h"

constexpr int64_t kTileElements = 32768;  // of a tile: a part of L2
constexpr int64_t kTileBytes = 2 << 20;  // of all tiles of a thread, unless one row alone takes more

template <class T>
struct Tile {
  struct alignas(64) Line {  // of cache
    char bytes[64];
  };
  static constexpr int kLanes = Accumulate<T>::kLanes;
  static constexpr int64_t kInLine = sizeof(Line) / sizeof(T);
  int64_t n, stride, rows;  // rows: so many at once
  std::unique_ptr<Line[]> memory;

  // Room for so many rows at once that they use whole lines of the tensor, too, but for no more than `most`, nor than
  // fit beside the other tiles. Rows lie an odd number of lines apart: not all in one set of the cache.
  Tile(int64_t n, int64_t most, int64_t tiles) : n(n), stride(((n + kInLine - 1) / kInLine | 1) * kInLine) {
    const int64_t fit = kTileBytes / tiles / (stride * int64_t(sizeof(T)));
    rows =
        std::min(std::max(kInLine, kTileElements / stride / kInLine * kInLine), (most + kLanes - 1) / kLanes * kLanes);
    if (rows > fit) rows = fit < kLanes ? std::max<int64_t>(fit, 1) : fit / kLanes * kLanes;
    memory.reset(new Line[rows * stride / kInLine]);
  }

  T* row(int64_t i) const { return reinterpret_cast<T*>(memory.get()) + i * stride; }

  // Whether `count` rows are transposed in squares of a vector's lanes; what the tile holds after the rows and their
  // elements does not matter.
  bool is_square(const Rows& tensor, int64_t count) const {
    return tensor.stride_inner == 1 && 2 * count >= kLanes && rows >= kLanes;
  }

  // `count` rows, the first of them at x.
  void gather(const T* x, const Rows& from, int64_t count) const {
    if (!is_square(from, count)) {
      for (int64_t c = 0; c < n; ++c)
        for (int64_t i = 0; i < count; ++i) row(i)[c] = x[c * from.stride_n + i * from.stride_inner];
      return;
    }
    for (int64_t c = 0; c < n; c += kLanes) {
      for (int64_t i = 0; i < count; i += kLanes) {
        const T* corner = x + c * from.stride_n + i;
        Vec<T> v[kLanes];
        if (c + kLanes <= n && i + kLanes <= count) {
#pragma GCC unroll 16
          for (int k = 0; k < kLanes; ++k) v[k] = load(corner + k * from.stride_n);
        } else {
          const int64_t width = std::min<int64_t>(kLanes, count - i);
          for (int k = 0; k < kLanes; ++k)
            v[k] = c + k < n ? load_part(corner + k * from.stride_n, width, Acc<T>(0)) : Vec<T>{};
        }
        transpose(v);
#pragma GCC unroll 16
        for (int k = 0; k < kLanes; ++k) store(row(i + k) + c, v[k]);
      }
    }
  }
  void scatter(T* y, const Rows& to, int64_t count) const {
    if (!is_square(to, count)) {
      for (int64_t c = 0; c < n; ++c)
        for (int64_t i = 0; i < count; ++i) y[c * to.stride_n + i * to.stride_inner] = row(i)[c];
      return;
    }
    for (int64_t c = 0; c < n; c += kLanes) {
      for (int64_t i = 0; i < count; i += kLanes) {
        T* corner = y + c * to.stride_n + i;
        Vec<T> v[kLanes];
#pragma GCC unroll 16
        for (int k = 0; k < kLanes; ++k) v[k] = load(row(i + k) + c);
        transpose(v);
        if (c + kLanes <= n && i + kLanes <= count) {
#pragma GCC unroll 16
          for (int k = 0; k < kLanes; ++k) store(corner + k * to.stride_n, v[k]);
        } else {
          const int64_t width = std::min<int64_t>(kLanes, count - i);
          for (int k = 0; k < std::min<int64_t>(kLanes, n - c); ++k) store_part(corner + k * to.stride_n, width, v[k]);
        }
      }
    }
  }
};
#endif
