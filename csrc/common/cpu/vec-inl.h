// Loads and stores of vectors, whole and in part, exp2 and reductions. [per ISA]
// Arithmetic is GCC's vector extension; intrinsics stand only where it has no word for the instruction.
#if defined(TSE_VEC_INL_H) == defined(TSE_ISA_TOGGLE)
#ifdef TSE_VEC_INL_H
#undef TSE_VEC_INL_H
#else
#define TSE_VEC_INL_H
#endif
#include "common/cpu/vec_types-inl.h"

// ---- memory -------------------------------------------------------------------------------------------------------

inline VecF load(const float* p) {
  VecF v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline VecD load(const double* p) {
  VecD v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
template <class T>
inline VecF load(const T* p) {
  VecH h;
  std::memcpy(&h, p, sizeof h);
  return widen(h, T{});
}

inline void store(float* p, VecF v) { std::memcpy(p, &v, sizeof v); }
inline void store(double* p, VecD v) { std::memcpy(p, &v, sizeof v); }
template <class T>
inline void store(T* p, VecF v) {
  const VecH h = narrow(v, T{});
  std::memcpy(p, &h, sizeof h);
}

// The lanes' numbers, to be compared: before `count`, all but one.
template <class V, size_t... lane>
inline auto lane_numbers(std::index_sequence<lane...>) {
  using Lanes = decltype(V{} > V{});
  using Lane = std::remove_cv_t<std::remove_reference_t<decltype(Lanes{}[0])>>;
  return Lanes{Lane(lane)...};
}
template <class V>
inline auto lane_numbers() {
  return lane_numbers<V>(std::make_index_sequence<sizeof(V) / sizeof(V{}[0])>{});
}
template <class V>
inline auto lanes_before(int64_t count) {
  const auto numbers = lane_numbers<V>();
  return numbers < numbers - numbers + decltype(numbers[0] + 0)(count);
}
template <class V>
inline auto lanes_but(int64_t lane) {
  const auto numbers = lane_numbers<V>();
  return numbers != numbers - numbers + decltype(numbers[0] + 0)(lane);
}

// Less than two vectors; memcpy of a size that is not known is a call.
template <class T>
inline void copy_part(T* to, const T* from, int64_t count) {
#pragma GCC unroll 5
  for (int size = Accumulate<T>::kLanes; size > 0; size /= 2) {
    if ((count & size) == 0) continue;
    std::memcpy(to, from, size * sizeof(T));
    to += size;
    from += size;
  }
}

// The first `count` lanes; in load_part the others are `fill`, and nothing after them is read or written.
template <class T>
inline Vec<T> load_part(const T* p, int64_t count, Acc<T> fill) {
  T buffer[Accumulate<T>::kLanes] = {};
  copy_part(buffer, p, count);
  return lanes_before<Vec<T>>(count) ? load(buffer) : splat<Vec<T>>(fill);
}
template <class T>
inline void store_part(T* p, int64_t count, Vec<T> v) {
  T buffer[Accumulate<T>::kLanes];
  store(buffer, v);
  copy_part(p, buffer, count);
}
#if TSE_ISA == 2
inline VecF load_part(const float* p, int64_t count, float fill) {
  return (VecF)_mm512_mask_loadu_ps(_mm512_set1_ps(fill), (__mmask16)((1u << count) - 1), p);
}
inline void store_part(float* p, int64_t count, VecF v) {
  _mm512_mask_storeu_ps(p, (__mmask16)((1u << count) - 1), (__m512)v);
}
#elif TSE_ISA == 1
inline VecF load_part(const float* p, int64_t count, float fill) {
  const VecI before = lanes_before<VecF>(count);
  return before ? (VecF)_mm256_maskload_ps(p, (__m256i)before) : splat<VecF>(fill);
}
#endif

// Two vectors of contiguous elements. Of bf16, a holds the even elements and b the odd ones, which needs no shuffle; of
// the other types, a holds the first half. store2 puts back what load2 took.
template <class V>
struct Pair {
  V a, b;
};
template <class T>
constexpr bool kEvenOdd = std::is_same_v<T, BFloat16>;
// Which elements the lanes of a pair hold.
template <class T>
inline auto pair_numbers() {
  const auto lane = lane_numbers<Vec<T>>();
  constexpr int kLanes = Accumulate<T>::kLanes;
  return kEvenOdd<T> ? Pair<decltype(lane + 0)>{lane * 2, lane * 2 + 1} : Pair<decltype(lane + 0)>{lane, lane + kLanes};
}
template <class T>
inline Pair<Vec<T>> load2(const T* p) {
  return {load(p), load(p + Accumulate<T>::kLanes)};
}
template <class T>
inline void store2(T* p, Pair<Vec<T>> v) {
  store(p, v.a);
  store(p + Accumulate<T>::kLanes, v.b);
}
inline Pair<VecF> load2(const BFloat16* p) {
  VecU u;
  std::memcpy(&u, p, sizeof u);
  const VecU even = u << 16, odd = u & 0xffff0000u;
  Pair<VecF> v;
  std::memcpy(&v.a, &even, sizeof even);
  std::memcpy(&v.b, &odd, sizeof odd);
  return v;
}
inline void store2(BFloat16* p, Pair<VecF> v) {
  const VecU u = (rounded_bits(v.a) >> 16) | (rounded_bits(v.b) & 0xffff0000u);
  std::memcpy(p, &u, sizeof u);
}

// The first `count` elements of a pair; in load2_part the others are `fill`, and nothing after them is read or written.
template <class T>
inline Pair<Vec<T>> load2_part(const T* p, int64_t count, Acc<T> fill) {
  constexpr int kLanes = Accumulate<T>::kLanes;
  if (count >= kLanes) return {load(p), load_part(p + kLanes, count - kLanes, fill)};
  return {load_part(p, count, fill), splat<Vec<T>>(fill)};
}
template <class T>
inline void store2_part(T* p, int64_t count, Pair<Vec<T>> v) {
  constexpr int kLanes = Accumulate<T>::kLanes;
  if (count < kLanes) return store_part(p, count, v.a);
  store(p, v.a);
  store_part(p + kLanes, count - kLanes, v.b);
}
inline Pair<VecF> load2_part(const BFloat16* p, int64_t count, float fill) {
  BFloat16 buffer[2 * kFloats] = {};
  copy_part(buffer, p, count);
  const Pair<VecF> v = load2(buffer);
  const auto at = pair_numbers<BFloat16>();
  return {at.a < int(count) ? v.a : splat<VecF>(fill), at.b < int(count) ? v.b : splat<VecF>(fill)};
}
inline void store2_part(BFloat16* p, int64_t count, Pair<VecF> v) {
  BFloat16 buffer[2 * kFloats];
  store2(buffer, v);
  copy_part(p, buffer, count);
}

inline float load_one(const float* p) { return *p; }
inline double load_one(const double* p) { return *p; }
template <class T>
inline float load_one(const T* p) {
  VecH h = {};
  h[0] = p->bits;
  return widen(h, T{})[0];
}
inline void store_one(float* p, float x) { *p = x; }
inline void store_one(double* p, double x) { *p = x; }
template <class T>
inline void store_one(T* p, float x) {
  p->bits = narrow(splat<VecF>(x), T{})[0];
}

// ---- arithmetic ---------------------------------------------------------------------------------------------------

// The larger and the smaller of a and b, and b where either is NaN. Comparison and choice would be one instruction,
// too, but not after the compiler has turned a comparison with a constant around.
#if TSE_ISA == 2
inline VecF vmin(VecF a, VecF b) { return (VecF)_mm512_min_ps((__m512)a, (__m512)b); }
inline VecD vmin(VecD a, VecD b) { return (VecD)_mm512_min_pd((__m512d)a, (__m512d)b); }
inline VecF vmax(VecF a, VecF b) { return (VecF)_mm512_max_ps((__m512)a, (__m512)b); }
inline VecD vmax(VecD a, VecD b) { return (VecD)_mm512_max_pd((__m512d)a, (__m512d)b); }
#elif TSE_ISA == 1
inline VecF vmin(VecF a, VecF b) { return (VecF)_mm256_min_ps((__m256)a, (__m256)b); }
inline VecD vmin(VecD a, VecD b) { return (VecD)_mm256_min_pd((__m256d)a, (__m256d)b); }
inline VecF vmax(VecF a, VecF b) { return (VecF)_mm256_max_ps((__m256)a, (__m256)b); }
inline VecD vmax(VecD a, VecD b) { return (VecD)_mm256_max_pd((__m256d)a, (__m256d)b); }
#else
inline VecF vmin(VecF a, VecF b) { return a < b ? a : b; }
inline VecD vmin(VecD a, VecD b) { return a < b ? a : b; }
inline VecF vmax(VecF a, VecF b) { return a > b ? a : b; }
inline VecD vmax(VecD a, VecD b) { return a > b ? a : b; }
#endif

#if TSE_ISA == 2
inline VecF vsqrt(VecF v) { return (VecF)_mm512_sqrt_ps((__m512)v); }
inline VecD vsqrt(VecD v) { return (VecD)_mm512_sqrt_pd((__m512d)v); }
#elif TSE_ISA == 1
inline VecF vsqrt(VecF v) { return (VecF)_mm256_sqrt_ps((__m256)v); }
inline VecD vsqrt(VecD v) { return (VecD)_mm256_sqrt_pd((__m256d)v); }
#else
template <class V>
inline V vsqrt(V v) {
  for (size_t i = 0; i < sizeof(V) / sizeof(v[0]); ++i) v[i] = std::sqrt(v[i]);
  return v;
}
#endif

// x · y - m with one rounding (two without FMA).
#if TSE_ISA == 0
template <class V>
inline V multiply_subtract(V x, V y, V m) {
  return x * y - m;
}
#elif TSE_ISA == 1  // not left to contraction, which spares a product that is used twice
inline VecF multiply_subtract(VecF x, VecF y, VecF m) { return (VecF)_mm256_fmsub_ps((__m256)x, (__m256)y, (__m256)m); }
inline VecD multiply_subtract(VecD x, VecD y, VecD m) {
  return (VecD)_mm256_fmsub_pd((__m256d)x, (__m256d)y, (__m256d)m);
}
#else
inline VecF multiply_subtract(VecF x, VecF y, VecF m) { return (VecF)_mm512_fmsub_ps((__m512)x, (__m512)y, (__m512)m); }
inline VecD multiply_subtract(VecD x, VecD y, VecD m) {
  return (VecD)_mm512_fmsub_pd((__m512d)x, (__m512d)y, (__m512d)m);
}
#endif

// x · y, rounded: the compiler does not contract it with an addition that follows, which would give other bits in one
// loop than in the next.
template <class V>
inline V rounded_product(V x, V y) {
  return multiply_subtract(x, y, V{});
}

// 2^t for logits of type T: an exponent i near t, and a minimax polynomial for 2^f of the rest f, of relative error
// 1e-7, and one degree less, 3e-6, for half types; exactly 1 at 0, which is where a row's largest term is. -inf gives
// 0, NaN gives NaN. AVX-512 takes t rounded down, is gradual below 2^-126 and infinite above 2^128; the others take the
// nearest, give 0 up to 2^-126.5 and infinity above 2^127.5.
#if TSE_ISA == 2
template <class T>
inline VecF exp2(VecF t) {
  const VecF f = (VecF)_mm512_reduce_ps((__m512)t, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);  // [0, 1), of -inf 0
  VecF p;
  if constexpr (sizeof(T) == 2) {
    p = f * 0x1.b7f756p-7f + 0x1.abf85ap-5f;
    p = p * f + 0x1.ee2452p-3f;
    p = p * f + 0x1.62d6c6p-1f;
  } else {
    p = f * 0x1.e97516p-10f + 0x1.27784ep-7f;
    p = p * f + 0x1.c91ce8p-5f;
    p = p * f + 0x1.ebdb56p-3f;
    p = p * f + 0x1.62e4bap-1f;
  }
  p = p * f + 1.0f;
  return (VecF)_mm512_scalef_ps((__m512)p, (__m512)t);  // takes the floor itself
}
#else
template <class T>
inline VecF exp2(VecF t) {
  t = vmin(splat<VecF>(128), vmax(splat<VecF>(-127), t));  // the exponents that can be built, -127: 0, 128: infinity
  constexpr float kShift = 0x1.8p23f + 127;
  const VecF shifted = t + kShift, f = t - (shifted - kShift);  // nearest integer + 127 in the lowest bits; [-1/2, 1/2]
  VecU bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  bits <<= 23;
  VecF scale, p;
  std::memcpy(&scale, &bits, sizeof scale);
  if constexpr (sizeof(T) == 2) {
    p = f * 0x1.3a02ccp-7f + 0x1.c9fc46p-5f;
    p = p * f + 0x1.ec0378p-3f;
    p = p * f + 0x1.62e12cp-1f;
  } else {
    p = f * 0x1.5bba14p-10f + 0x1.3cea88p-7f;
    p = p * f + 0x1.c6b752p-5f;
    p = p * f + 0x1.ebf9bcp-3f;
    p = p * f + 0x1.62e42ap-1f;
  }
  return (p * f + 1.0f) * scale;
}
#endif
template <class T>
inline VecD exp2(VecD t) {  // relative error 2e-16; 0 up to 2^-1022.5 and infinity above 2^1023.5 at every level
  t = vmin(splat<VecD>(1024), vmax(splat<VecD>(-1023), t));
  constexpr double kShift = 0x1.8p52 + 1023;
  const VecD shifted = t + kShift, f = t - (shifted - kShift);
  VecL bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  bits <<= 52;
  VecD scale, p = f * 0x1.e9d3fe3952179p-32 + 0x1.e6063f7217bc6p-28;
  std::memcpy(&scale, &bits, sizeof scale);
  p = p * f + 0x1.b524fae627834p-24;
  p = p * f + 0x1.62bfd47773353p-20;
  p = p * f + 0x1.ffcbfc670dcd4p-17;
  p = p * f + 0x1.430913096fd9fp-13;
  p = p * f + 0x1.5d87fe78a5276p-10;
  p = p * f + 0x1.3b2ab6fba1ddap-7;
  p = p * f + 0x1.c6b08d704a0c2p-5;
  p = p * f + 0x1.ebfbdff82c598p-3;
  p = p * f + 0x1.62e42fefa39efp-1;
  return (p * f + 1.0) * scale;
}

// One bit a lane where not v <= bound: NaN is above.
template <class V>
inline unsigned mask_above(V v, decltype(V{}[0] + V{}[0]) bound) {
  unsigned mask = 0;
  for (unsigned i = 0; i < sizeof(V) / sizeof(v[0]); ++i) mask |= unsigned(!(v[i] <= bound)) << i;
  return mask;
}
#if TSE_ISA == 2
inline unsigned mask_above(VecF v, float bound) {
  return _mm512_cmp_ps_mask((__m512)v, _mm512_set1_ps(bound), _CMP_NLE_UQ);
}
#elif TSE_ISA == 1
inline unsigned mask_above(VecF v, float bound) {
  return _mm256_movemask_ps(_mm256_cmp_ps((__m256)v, _mm256_set1_ps(bound), _CMP_NLE_UQ));
}
#endif

template <class Mask>
inline bool any_lane(Mask mask) {
  bool any = false;
  for (size_t i = 0; i < sizeof(Mask) / sizeof(mask[0]); ++i) any |= mask[i] != 0;
  return any;
}

// Reductions fold halves onto each other, always in the same order: every build of a level gives the same bits.
template <size_t half, class V, class Op, size_t... lane>
[[gnu::always_inline]] inline V folded(V v, const Op& op, std::index_sequence<lane...> lanes) {
  const decltype(V{} > V{}) other = {(lane ^ half)...};
  v = op(v, __builtin_shuffle(v, other));
  if constexpr (half > 1) return folded<half / 2>(v, op, lanes);
  else return v;
}
template <class V, class Op>
[[gnu::always_inline]] inline auto fold(V v, const Op& op) {
  constexpr size_t kLanes = sizeof(V) / sizeof(v[0]);
  return folded<kLanes / 2>(v, op, std::make_index_sequence<kLanes>{})[0];
}
template <class V>
inline auto reduce_add(V v) {
  return fold(v, [&](V a, V b) { return a + b; });
}
template <class V>
inline auto reduce_max(V v) {  // of a vector without NaN
  return fold(v, [&](V a, V b) { return vmax(a, b); });
}
#endif
