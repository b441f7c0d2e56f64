// Marching a ray through a bit-packed occupancy grid: which points of its lattice are samples.
//
// A sample k spans t_k .. t_{k+1} of the lattice t_k = start + k step, and is kept when its midpoint lies in an
// occupied cell. That test is made in float64 on float32 inputs, where every product is exact, so that fused and
// separate multiply-adds agree and every backend finds the same samples. Whole stretches of the lattice inside one cell
// (or one empty block of cells) are decided at once; a safety margin leaves the points near a face to the test itself.
#pragma once

#include <cmath>

#include "hd.h"

namespace mvdream_fast {
namespace MVDREAM_FAST_ISA {

// Whether a ray can be marched.
enum MarchStatus {
  kMarchFine = 0,
  kMarchNotFinite = 1,
  kMarchNoDirection = 2,
  kMarchJitter = 3,
  kMarchFar = 4,
  kMarchTooFine = 5,
  kMarchBox = 6,
};

// A component of a direction this small moves no midpoint out of its cell: its axis never bounds a stretch.
constexpr float kParallel = 1e-30f;

// Steps of a ray through the box. Near a cell's face a march tests points of the lattice one by one, in number one in a
// million of its steps: with more than these it would not end.
constexpr float kMostSteps = 4294967296.0f;

constexpr int kBlock = 4;  // cells a side of a block

// What is known of a block: nothing in it, something, or every cell of a whole block (one that the grid doesn't cut).
constexpr uint8_t kBlockEmpty = 0, kBlockMixed = 1, kBlockFull = 2;

// Cell (x, y, z) is bit i % 8 of bits[i / 8], i = (x n[1] + y) n[2] + z.
struct OccupancyView {
  const uint8_t* bits;
  const uint8_t* blocks;  // [n_blocks[0], n_blocks[1], n_blocks[2]], or null
  int n[3];
  int n_blocks[3];
  double low[3];
  double scale[3];  // cells per scene unit
  double size[3];   // scene units per cell
  double clip[6];   // a box that holds every occupied cell: minimum, maximum
};

MVDREAM_FAST_HD OccupancyView make_view(const uint8_t* bits, const uint8_t* blocks, const int* n, const float* aabb) {
  OccupancyView view;
  view.bits = bits;
  view.blocks = blocks;
  for (int a = 0; a < 3; ++a) {
    const double extent = static_cast<double>(aabb[a + 3]) - aabb[a];
    view.n[a] = n[a];
    view.n_blocks[a] = (n[a] + kBlock - 1) / kBlock;
    view.low[a] = aabb[a];
    view.scale[a] = n[a] / extent;
    view.size[a] = extent / n[a];
    view.clip[a] = aabb[a];
    view.clip[a + 3] = aabb[a + 3];
  }
  return view;
}

MVDREAM_FAST_HD bool cell_occupied(const OccupancyView& grid, const int* cell) {
  const int64_t i = (static_cast<int64_t>(cell[0]) * grid.n[1] + cell[1]) * grid.n[2] + cell[2];
  return grid.bits[i >> 3] >> (i & 7) & 1;
}

MVDREAM_FAST_HD int64_t block_index(const OccupancyView& grid, const int* cell) {
  const int64_t row = static_cast<int64_t>(cell[0] / kBlock) * grid.n_blocks[1] + cell[1] / kBlock;
  return row * grid.n_blocks[2] + cell[2] / kBlock;
}

// The walk of one ray; next() yields its runs of consecutive samples, nearest first.
struct RayWalk {
  double o[3], d[3], inv[3];
  double start, step, inv_step, far, slack;
  int64_t k, k_end;
};

MVDREAM_FAST_HD float lattice_t(double start, double step, int64_t k) {
  return static_cast<float>(start + static_cast<double>(k) * step);
}

MVDREAM_FAST_HD double lattice_mid(double start, double step, int64_t k) {
  return 0.5 * (static_cast<double>(lattice_t(start, step, k)) + static_cast<double>(lattice_t(start, step, k + 1)));
}

// A point of the ray as float32 arithmetic without fused multiply-adds gives it: both detours through double are exact.
MVDREAM_FAST_HD void point_at(const float* o, const float* d, float t, float* out) {
  for (int a = 0; a < 3; ++a) {
    const float step = static_cast<float>(static_cast<double>(d[a]) * t);
    out[a] = static_cast<float>(static_cast<double>(o[a]) + step);
  }
}

MVDREAM_FAST_HD MarchStatus status_of_ray(const float* o, const float* d, float jitter, float near, float far,
                                          const float* aabb, float step) {
  float finite = 0.0f * near;
  for (int a = 0; a < 3; ++a) finite += 0.0f * o[a] + 0.0f * d[a];  // NaN if anything is infinite or NaN
  if (!(finite == 0.0f)) return kMarchNotFinite;
  if (!(jitter >= 0 && jitter < 1)) return kMarchJitter;
  if (far != far) return kMarchFar;
  const float most = kMostSteps * step;
  bool parallel = true, few = far - near <= most;
  for (int a = 0; a < 3; ++a) {
    const float component = fabsf(d[a]);
    parallel = parallel && component < kParallel;
    few = few || (component >= kParallel && aabb[a + 3] - aabb[a] <= component * most);
  }
  if (parallel) return kMarchNoDirection;
  return few ? kMarchFine : kMarchTooFine;
}

// First lattice index at or above x, kept in the range of integers.
MVDREAM_FAST_HD int64_t ceil_index(double x) {
  if (!(x > 0)) return 0;
  return x < 4e18 ? static_cast<int64_t>(ceil(x)) : INT64_C(4000000000000000000);
}

MVDREAM_FAST_HD void clip_to_slab(double near_side, double far_side, double o, double inv, double* enter,
                                  double* exit) {
  const double a = (near_side - o) * inv, b = (far_side - o) * inv;
  *enter = fmax(*enter, fmin(a, b));
  *exit = fmin(*exit, fmax(a, b));
}

// jitter is a fraction of the step; far bounds the midpoints.
MVDREAM_FAST_HD RayWalk begin_walk(const OccupancyView& grid, const float* o, const float* d, float jitter, float near,
                                   float far, float step) {
  RayWalk walk;
  walk.step = step;
  walk.inv_step = 1.0 / walk.step;
  walk.start = static_cast<double>(near) + static_cast<double>(jitter) * walk.step;
  walk.far = far;
  walk.slack = 0;
  double enter = walk.start, exit = walk.far;
  for (int a = 0; a < 3; ++a) {
    walk.o[a] = o[a];
    walk.d[a] = d[a];
    walk.slack += 1e-9 * (fabs(walk.o[a]) + fabs(grid.low[a]) + grid.size[a] * grid.n[a]);
    const bool parallel = fabs(walk.d[a]) < kParallel;
    walk.inv[a] = parallel ? 0 : 1.0 / walk.d[a];
    if (!parallel) clip_to_slab(grid.clip[a], grid.clip[a + 3], walk.o[a], walk.inv[a], &enter, &exit);
  }
  // Two steps generous on either side: next() tests the midpoints themselves.
  walk.k = enter <= exit + 4 * walk.step ? ceil_index((enter - walk.start) * walk.inv_step - 3) : 0;
  walk.k_end = enter <= exit + 4 * walk.step ? ceil_index((exit - walk.start) * walk.inv_step + 2) : 0;
  return walk;
}

// The first lattice index that is not surely inside the box of `cells` cells a side around `cell`, and nearer than far.
MVDREAM_FAST_HD int64_t stretch_end(const OccupancyView& grid, const RayWalk& walk, const int* cell, int cells) {
  double exit = walk.far;
  for (int a = 0; a < 3; ++a) {
    if (walk.inv[a] == 0) continue;
    const int first = cell[a] / cells * cells;
    const double face = walk.d[a] > 0 ? grid.low[a] + grid.size[a] * (first + cells) - walk.slack
                                      : grid.low[a] + grid.size[a] * first + walk.slack;
    exit = fmin(exit, (face - walk.o[a]) * walk.inv[a]);
  }
  // The lattice is rounded to float32; 1e-6 is 16 times that rounding.
  const int64_t end = ceil_index((exit - 1e-6 * fabs(exit) - walk.start) * walk.inv_step - 0.5);
  return end < walk.k_end ? end : walk.k_end;
}

// The next run begin <= k < end of samples; false when the ray is done.
MVDREAM_FAST_HD bool next_run(const OccupancyView& grid, RayWalk* walk, int64_t* begin, int64_t* end) {
  while (walk->k < walk->k_end) {
    const double t = lattice_mid(walk->start, walk->step, walk->k);
    if (!(t < walk->far)) return false;
    int cell[3];
    bool inside = true;
    for (int a = 0; a < 3; ++a) {
      const double x = (walk->o[a] + walk->d[a] * t - grid.low[a]) * grid.scale[a];
      inside = inside && x >= 0 && x < grid.n[a];
      cell[a] = inside ? static_cast<int>(x) : 0;
    }
    const int64_t here = walk->k;
    if (!inside) {
      walk->k = here + 1;
      continue;
    }
    const uint8_t block = grid.blocks != nullptr ? grid.blocks[block_index(grid, cell)] : kBlockMixed;
    const bool occupied = block == kBlockMixed ? cell_occupied(grid, cell) : block == kBlockFull;
    const int64_t stretch = stretch_end(grid, *walk, cell, block == kBlockMixed ? 1 : kBlock);
    walk->k = stretch > here ? stretch : here + 1;
    if (!occupied) continue;
    *begin = here;
    *end = walk->k;
    return true;
  }
  return false;
}

}  // namespace MVDREAM_FAST_ISA
}  // namespace mvdream_fast
