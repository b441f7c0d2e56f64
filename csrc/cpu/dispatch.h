// Which instruction set the CPU ops run on, and how an op reaches it.
//
// Every csrc/cpu/<op>.cpp is compiled once per instruction set with -DMVDREAM_FAST_ISA=<name>. Its header declares the
// entry points with MVDREAM_FAST_CPU_OP, the .cpp defines them inside `namespace mvdream_fast::MVDREAM_FAST_ISA`, and
// the bindings call MVDREAM_FAST_CPU(name)(arguments...):
//
//   geglu.h    MVDREAM_FAST_CPU_OP(void, geglu_forward, const float* x, int64_t n, float* y, int n_threads)
//   geglu.cpp  namespace mvdream_fast::MVDREAM_FAST_ISA { void geglu_forward(const float* x, ...) { ... } }
//   bindings   MVDREAM_FAST_CPU(geglu_forward)(x, n, y, n_threads);
//
// Shared inline maths (csrc/*.h) must be in that namespace too (or static), so that no copy compiled for AVX-512 is
// merged into the baseline by the linker.
#pragma once

#include <string>
#include <vector>

namespace mvdream_fast {

enum class Isa { baseline = 0, avx2 = 1, avx512 = 2 };

// The widest set that was built and that this CPU has, or the one that MVDREAM_FAST_ISA names; read once.
// Throws std::invalid_argument when MVDREAM_FAST_ISA names a set that is unknown, not built, or not in this CPU.
Isa current_isa();
const char* isa_name(Isa isa);
std::vector<Isa> built_isas();
bool cpu_has(Isa isa);

template <typename Function>
Function* pick_isa(Function* baseline, Function* avx2, Function* avx512) {
  const Isa isa = current_isa();
  return isa == Isa::avx512 ? avx512 : isa == Isa::avx2 ? avx2 : baseline;
}

}  // namespace mvdream_fast

#define MVDREAM_FAST_CPU_OP(result, name, ...) \
  namespace mvdream_fast::baseline {           \
  result name(__VA_ARGS__);                    \
  }                                            \
  namespace mvdream_fast::avx2 {               \
  result name(__VA_ARGS__);                    \
  }                                            \
  namespace mvdream_fast::avx512 {             \
  result name(__VA_ARGS__);                    \
  }

// An instruction set that was not built is never current, so its slot may hold the baseline function.
#ifdef MVDREAM_FAST_HAS_avx2
#define MVDREAM_FAST_AVX2(name) &mvdream_fast::avx2::name
#else
#define MVDREAM_FAST_AVX2(name) &mvdream_fast::baseline::name
#endif
#ifdef MVDREAM_FAST_HAS_avx512
#define MVDREAM_FAST_AVX512(name) &mvdream_fast::avx512::name
#else
#define MVDREAM_FAST_AVX512(name) &mvdream_fast::baseline::name
#endif
#define MVDREAM_FAST_CPU(name) \
  (mvdream_fast::pick_isa(&mvdream_fast::baseline::name, MVDREAM_FAST_AVX2(name), MVDREAM_FAST_AVX512(name)))
