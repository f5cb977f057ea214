// Logarithm and hyperbolic tangent of vectors. [per ISA]
#if defined(TSE_MATH_INL_H) == defined(TSE_ISA_TOGGLE)
#ifdef TSE_MATH_INL_H
#undef TSE_MATH_INL_H
#else
#define TSE_MATH_INL_H
#endif
#include "common/cpu/vec-inl.h"

// log2(1 + r) in the lanes where is_small, which needs -1/4 <= r < 1/3, else log2(x) of a positive normal x. The
// exponent of x is taken apart; of the mantissa 1 + r it is 2 / ln 2 · atanh(r / (2 + r)). Relative error 1e-7, of fp64
// 4e-16, next to 1, too. 0 gives -inf; infinity and NaN give no number.
template <class Mask>
inline VecF log2_1p_or(Mask is_small, VecF r, VecF x) {
  VecI bits;
  std::memcpy(&bits, &x, sizeof bits);
  const VecI e = (bits - 0x3f2aaaab) >> 23;  // the mantissa in [2/3, 4/3)
  bits -= e << 23;
  VecF f;
  std::memcpy(&f, &bits, sizeof f);
  r = is_small ? r : f - 1.0f;
  const VecF z = r / (r + 2.0f), z2 = z * z;
  VecF q = z2 * 0.32059889f + 0.41219858f;
  q = q * z2 + 0.57707802f;
  q = q * z2 + 0.96179669f;
  q = q * z2 + 2.88539008f;
  const VecF bad = x - x;  // NaN for infinity and NaN
  const VecF y = z * q + (is_small ? VecF{} : __builtin_convertvector(e, VecF) + bad);
  return is_small | (x != VecF{}) ? y : VecF{} - std::numeric_limits<float>::infinity();
}
template <class Mask>
inline VecD log2_1p_or(Mask is_small, VecD r, VecD x) {
  constexpr uint64_t kLowest = 0x3fe6a09e667f3bcd, kOne = 0x3ff0000000000000, kMantissa = (uint64_t(1) << 52) - 1;
  VecL bits;
  std::memcpy(&bits, &x, sizeof bits);
  bits += kOne - kLowest;  // the mantissa in [sqrt(1/2), sqrt(2)]
  const VecL f_bits = (bits & kMantissa) + kLowest, e_bits = (bits >> 52) | 0x4330000000000000;  // 2^52 + exponent
  VecD f, e;
  std::memcpy(&f, &f_bits, sizeof f);
  std::memcpy(&e, &e_bits, sizeof e);
  r = is_small ? r : f - 1.0;
  const VecD z = r / (r + 2.0), z2 = z * z;
  VecD q = z2 * 0x1.b59a37cead320p-3 + 0x1.c46d539e68138p-3;
  q = q * z2 + 0x1.0ca1643c80b53p-2;
  q = q * z2 + 0x1.484afb66db3f8p-2;
  q = q * z2 + 0x1.a61762d6c67cdp-2;
  q = q * z2 + 0x1.2776c50ee37e3p-1;
  q = q * z2 + 0x1.ec709dc3a047ep-1;
  q = q * z2 + 0x1.71547652b82fep+1;
  const VecD bad = x - x;
  const VecD y = z * q + (is_small ? VecD{} : e - (0x1p52 + 1023) + bad);
  return is_small | (x != VecD{}) ? y : VecD{} - std::numeric_limits<double>::infinity();
}
template <class V>
inline V log2(V x) {
  return log2_1p_or(V{} > V{}, V{}, x);
}

// tanh(x) = (e - 1) / (e + 1) of e = exp(2 |x|), where e - 1 is computed without cancellation: relative error 4e-7.
inline VecF tanh(VecF x) {
  VecF t = (x < VecF{} ? -x : x) * 2.88539008f;
  t = vmin(splat<VecF>(30.0f), t);  // NaN stays
  const VecF shifted = t + 0x1.8p23f, i = shifted - 0x1.8p23f, f = t - i;  // i: nearest integer
  VecI bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  bits = (bits << 23) + (127 << 23);
  VecF scale;
  std::memcpy(&scale, &bits, sizeof scale);
  VecF p = f * 1.5252734e-5f + 1.5403530e-4f;  // (2^f - 1) / f
  p = p * f + 1.3333558e-3f;
  p = p * f + 9.6181291e-3f;
  p = p * f + 5.5504109e-2f;
  p = p * f + 2.4022651e-1f;
  p = p * f + 6.9314718e-1f;
  const VecF e = p * f * scale + (scale - 1.0f), y = e / (e + 2.0f);
  return x < VecF{} ? -y : y;
}
inline VecD tanh(VecD x) {
  for (int i = 0; i < kDoubles; ++i) x[i] = std::tanh(x[i]);
  return x;
}
#endif
