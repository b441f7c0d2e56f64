// Large pages for memory that is fresh.
#pragma once

#include <cstdint>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace mvdream_fast {

constexpr int64_t kHugePage = int64_t(2) << 20;

// Asks the system to back fresh memory with huge pages: touching it page by page costs more than writing it.
[[maybe_unused]] static void advise_huge_pages(void* memory, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  const uintptr_t huge = kHugePage;
  const uintptr_t first = (uintptr_t(memory) + huge - 1) / huge * huge;
  const uintptr_t last = (uintptr_t(memory) + bytes) / huge * huge;
  if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);  // a hint: may fail
#else
  (void)memory, (void)bytes;
#endif
}

}  // namespace mvdream_fast
