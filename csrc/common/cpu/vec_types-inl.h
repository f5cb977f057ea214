// Vectors of one native register, and the type that a storage type is computed in. [per ISA]
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
#endif
