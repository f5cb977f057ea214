#include "common/cpu/isa.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>

namespace tse {
namespace {

Isa best_isa() {
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
  // __builtin_cpu_supports also asks XCR0 whether the operating system saves the registers.
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return avx512 ? Isa::kAvx512 : avx2 ? Isa::kAvx2 : Isa::kBaseline;
#else
  return Isa::kBaseline;
#endif
}

Isa choose_isa() {
  const char* wish = std::getenv("ATEN_CPU_CAPABILITY");
  if (wish == nullptr) return best_isa();
  for (Isa isa : {Isa::kBaseline, Isa::kAvx2, Isa::kAvx512})
    if (std::strcmp(wish, isa_name(isa)) == 0) return std::min(isa, best_isa());
  return best_isa();  // another word is for another part of torch ("avx512_vnni", "vsx")
}

}  // namespace

Isa active_isa() {
  static const Isa isa = choose_isa();
  return isa;
}

const char* isa_name(Isa isa) { return isa == Isa::kAvx512 ? "avx512" : isa == Isa::kAvx2 ? "avx2" : "default"; }

}  // namespace tse
