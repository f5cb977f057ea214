// Which of the compiled instruction-set levels runs. [plain]
// Chosen once per process: the best level of this CPU and operating system, lowered by torch's own
// ATEN_CPU_CAPABILITY ("default", "avx2", "avx512"); a level above what the machine has is lowered, too.
#pragma once

namespace tse {

enum class Isa { kBaseline, kAvx2, kAvx512 };

Isa active_isa();
const char* isa_name(Isa isa);  // "default", "avx2", "avx512": the words of ATEN_CPU_CAPABILITY

}  // namespace tse
