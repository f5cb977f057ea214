// Vectors of one native register, the type that a storage type is computed in, and conversions. [per ISA]
// TSE_ISA is the level: 0 (16 bytes, any CPU), 1 (AVX2 and FMA), 2 (AVX-512).
#if defined(TSE_VEC_TYPES_INL_H) == defined(TSE_ISA_TOGGLE)
#ifdef TSE_VEC_TYPES_INL_H
#undef TSE_VEC_TYPES_INL_H
#else
#define TSE_VEC_TYPES_INL_H
#endif

constexpr int kVectorBytes = TSE_ISA == 2 ? 64 : TSE_ISA == 1 ? 32 : 16;
constexpr int kFloats = kVectorBytes / 4;
constexpr int kDoubles = kVectorBytes / 8;

typedef float VecF __attribute__((vector_size(kVectorBytes)));
typedef int32_t VecI __attribute__((vector_size(kVectorBytes)));
typedef uint32_t VecU __attribute__((vector_size(kVectorBytes)));
typedef uint16_t VecH __attribute__((vector_size(kVectorBytes / 2)));  // as many as VecF has lanes
typedef double VecD __attribute__((vector_size(kVectorBytes)));
typedef uint64_t VecL __attribute__((vector_size(kVectorBytes)));

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

// What the arithmetic for storage type T is done in.
template <class T>
struct Accumulate {
  using Scalar = float;
  using Vec = VecF;
  static constexpr int kLanes = kFloats;
};
template <>
struct Accumulate<double> {
  using Scalar = double;
  using Vec = VecD;
  static constexpr int kLanes = kDoubles;
};
template <class T>
using Acc = typename Accumulate<T>::Scalar;
template <class T>
using Vec = typename Accumulate<T>::Vec;

template <class V>
inline V splat(decltype(V{}[0] + V{}[0]) x) {
  return V{} + x;
}

// ---- conversion between half types and fp32 ------------------------------------------------------------------------

inline VecF widen(VecH h, BFloat16) {
  const VecU u = __builtin_convertvector(h, VecU) << 16;
  VecF f;
  std::memcpy(&f, &u, sizeof f);
  return f;
}

// f rounded to nearest even in its upper 16 bits; of NaN all bits are set, so that it stays NaN.
inline VecU rounded_bits(VecF f) {
  VecU u;
  std::memcpy(&u, &f, sizeof u);
  return (u + 0x7fffu + ((u >> 16) & 1u)) | (VecU)(f != f);
}

inline VecH narrow(VecF f, BFloat16) { return __builtin_convertvector(rounded_bits(f) >> 16, VecH); }

#if TSE_ISA == 2
inline VecF widen(VecH h, Half) { return (VecF)_mm512_cvtph_ps((__m256i)h); }
inline VecH narrow(VecF f, Half) {
  return (VecH)_mm512_cvtps_ph((__m512)f, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
#elif TSE_ISA == 1
inline VecF widen(VecH h, Half) { return (VecF)_mm256_cvtph_ps((__m128i)h); }
inline VecH narrow(VecF f, Half) {
  return (VecH)_mm256_cvtps_ph((__m256)f, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
#else
inline VecF widen(VecH h, Half) {
  // Exponent and mantissa moved to float's place, then the exponent's bias corrected by a multiplication, which also
  // normalises subnormals; infinity and NaN get the full exponent back.
  const VecU u = __builtin_convertvector(h, VecU);
  const VecU magnitude = (u & 0x7fffu) << 13;
  VecF f;
  std::memcpy(&f, &magnitude, sizeof f);
  f *= 0x1p112f;
  VecU bits;
  std::memcpy(&bits, &f, sizeof bits);
  bits |= (VecU)((u & 0x7c00u) == 0x7c00u) & 0x7f800000u;
  bits |= (u & 0x8000u) << 16;
  std::memcpy(&f, &bits, sizeof f);
  return f;
}

inline VecH narrow(VecF f, Half) {
  VecU u;
  std::memcpy(&u, &f, sizeof u);
  const VecU sign = (u >> 16) & 0x8000u;
  u &= 0x7fffffffu;
  VecF magnitude;
  std::memcpy(&magnitude, &u, sizeof magnitude);
  // Below 2^-14 the result is subnormal: adding 0.5 lets float's own rounding cut at 2^-24.
  const VecF shifted = magnitude + 0.5f;
  VecU subnormal;
  std::memcpy(&subnormal, &shifted, sizeof subnormal);
  subnormal -= 0x3f000000u;
  const VecU normal = (u - (112u << 23) + 0xfffu + ((u >> 13) & 1u)) >> 13;
  const VecU is_small = (VecU)(magnitude < 0x1p-14f), is_huge = (VecU)(magnitude >= 65520.0f), is_nan = (VecU)(f != f);
  VecU h = (subnormal & is_small) | (normal & ~is_small);
  h = (h & ~is_huge) | (is_huge & 0x7c00u);
  h = (h & ~is_nan) | (is_nan & 0x7e00u);
  return __builtin_convertvector(h | sign, VecH);
}
#endif
#endif
