// CPU entry points of the packed scans and of the general grid traversal.
#pragma once

#include <cstdint>

#include "cpu/dispatch.h"
#include "traverse.h"

namespace mvdream_fast {

struct ScanArgs {
  const void* values;          // [S] float, or double where wide
  const int64_t* packed_info;  // [R, 2]
  int64_t n_rays, n_samples;
  bool wide, product, exclusive, reverse;
  void* out;  // [S]
  int n_threads;
};

}  // namespace mvdream_fast

MVDREAM_FAST_CPU_OP(void, packed_scan, const mvdream_fast::ScanArgs& args)
// values are the factors, out their gradient; reverse is not used.
MVDREAM_FAST_CPU_OP(void, packed_product_backward, const mvdream_fast::ScanArgs& args, const void* d_out)
MVDREAM_FAST_CPU_OP(void, traverse, const mvdream_fast::TraverseArgs& args)
