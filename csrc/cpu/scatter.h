// Sums of many rows into few places, in one order for any number of threads: every place has one owner, who looks
// through all rows in their order and adds those that are its own.
#pragma once

#include <cstdint>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace mvdream_fast {
namespace MVDREAM_FAST_ISA {

constexpr int64_t kOwnedRun = 64;  // neighbouring places of one owner: no cache line has two

// The calling thread's share of a team's places.
struct Owner {
  int64_t own = 0, team = 1;
  Owner() {
#ifdef _OPENMP
    own = omp_get_thread_num();
    team = omp_get_num_threads();
#endif
  }
  bool has(int64_t place) const { return place / kOwnedRun % team == own; }
};

}  // namespace MVDREAM_FAST_ISA
}  // namespace mvdream_fast
