// The choice of instruction set: compiled once, for the baseline.
#include "cpu/dispatch.h"

#include <cstdlib>
#include <stdexcept>

namespace mvdream_fast {

const char* isa_name(Isa isa) { return isa == Isa::avx512 ? "avx512" : isa == Isa::avx2 ? "avx2" : "baseline"; }

std::vector<Isa> built_isas() {
  std::vector<Isa> built{Isa::baseline};
#ifdef MVDREAM_FAST_HAS_avx2
  built.push_back(Isa::avx2);
#endif
#ifdef MVDREAM_FAST_HAS_avx512
  built.push_back(Isa::avx512);
#endif
  return built;
}

bool cpu_has(Isa isa) {
  if (isa == Isa::baseline) return true;
#if defined(__x86_64__) && defined(__GNUC__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (isa == Isa::avx2) return avx2;
  return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#else
  return false;
#endif
}

static Isa choose_isa() {
  const char* wanted = std::getenv("MVDREAM_FAST_ISA");
  Isa best = Isa::baseline;
  for (Isa isa : built_isas()) {
    if (wanted != nullptr && std::string(wanted) == isa_name(isa)) {
      if (cpu_has(isa)) return isa;
      throw std::invalid_argument(std::string("MVDREAM_FAST_ISA must be an instruction set of this CPU, got ") +
                                  wanted + "; unset it to take the best one");
    }
    if (cpu_has(isa)) best = isa;
  }
  if (wanted == nullptr || *wanted == '\0') return best;
  throw std::invalid_argument(std::string("MVDREAM_FAST_ISA must be baseline, avx2 or avx512 and built, got ") +
                              wanted + "; unset it to take the best one");
}

Isa current_isa() {
  static const Isa isa = choose_isa();
  return isa;
}

}  // namespace mvdream_fast
