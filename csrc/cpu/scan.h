// CPU entry points of the packed scans and of the general grid traversal.
#pragma once

#include <cstdint>

#include "cpu/dispatch.h"

namespace mvdream_fast {

struct ScanArgs {
  const void* values;          // [S] float, or double where wide
  const int64_t* packed_info;  // [R, 2]
  int64_t n_rays;
  bool wide, product, exclusive, reverse;
  void* out;  // [S]
  int n_threads;
};

struct TraverseArgs {
  const float* rays_o;   // [R, 3]
  const float* rays_d;   // [R, 3]
  const uint8_t* mask;   // [R]
  const float* near;     // [R]
  const float* far;      // [R]
  const uint8_t* cells;  // [n_grids, n[0], n[1], n[2]]
  const float* aabbs;    // [n_grids, 6]
  int64_t n_rays;
  int n_grids;
  int n[3];
  float step, cone;
  int64_t limit;  // samples of a ray, negative for none
  int64_t* n_edges;
  int64_t* n_samples;
  float* t_last;  // [R]
  // Filled where not null.
  const int64_t* edge_starts;
  const int64_t* sample_starts;
  float* edges;
  uint8_t* is_left;
  uint8_t* is_right;
  float* mids;
  int n_threads;
};

}  // namespace mvdream_fast

MVDREAM_FAST_CPU_OP(void, packed_scan, const mvdream_fast::ScanArgs& args)
// values are the factors, out their gradient; reverse is not used.
MVDREAM_FAST_CPU_OP(void, packed_product_backward, const mvdream_fast::ScanArgs& args, const void* d_out)
MVDREAM_FAST_CPU_OP(void, traverse, const mvdream_fast::TraverseArgs& args)
