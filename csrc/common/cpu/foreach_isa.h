// Compiles one file of row functions once per instruction-set level, each in a namespace of its own. [per ISA]
//
//   #define TSE_ISA_BODY "cross_entropy/cross_entropy_cpu-inl.h"
//   #include "common/cpu/foreach_isa.h"
//   TSE_ROWS(cross_entropy_rows, CrossEntropyParams)  // calls the running level's
//
// Target regions instead of per-file compiler flags, which setuptools does not have. What that asks for:
// every standard header stands here or before, never behind the first region (a template first seen inside one would
// become a weak symbol with AVX-512 code, shared with the whole program); everything else stands inside the level's
// namespace; the level is told by TSE_ISA, since g++ does not define __AVX512F__ inside a region.
//
// The loops that are long in vector arithmetic are [[gnu::flatten]]: no vector register outlives a call, and g++ stops
// inlining where a file has grown by two fifths, at whichever function it then is (-Winline).
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <tuple>
#include <type_traits>
#include <utility>

#include "common/cpu/isa.h"
#include "common/exp_sum.h"
#include "common/row_params.h"
#include "common/types.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define TSE_ISA_X86 1
#include <immintrin.h>
// g++ 12 warns of its own header's deliberately undefined operands (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#else
#define TSE_ISA_X86 0
#endif

#define TSE_ISA 0
namespace tse::isa_default {
namespace {
#include TSE_ISA_BODY
}
}  // namespace tse::isa_default
#undef TSE_ISA

#if TSE_ISA_X86
#define TSE_ISA_TOGGLE  // lets the guards of the -inl.h headers open once more
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#define TSE_ISA 1
namespace tse::isa_avx2 {
namespace {
#include TSE_ISA_BODY
}
}  // namespace tse::isa_avx2
#undef TSE_ISA
#pragma GCC pop_options

#undef TSE_ISA_TOGGLE
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
#define TSE_ISA 2
namespace tse::isa_avx512 {
namespace {
#include TSE_ISA_BODY
}
}  // namespace tse::isa_avx512
#undef TSE_ISA
#pragma GCC pop_options

#define TSE_ROWS(function, Params)                                          \
  void tse::function(const Params& p, int64_t begin, int64_t end) {         \
    if (active_isa() == Isa::kAvx512) isa_avx512::function(p, begin, end);  \
    else if (active_isa() == Isa::kAvx2) isa_avx2::function(p, begin, end); \
    else isa_default::function(p, begin, end);                              \
  }
#else
#define TSE_ROWS(function, Params) \
  void tse::function(const Params& p, int64_t begin, int64_t end) { isa_default::function(p, begin, end); }
#endif
