// The arguments of a march, ready to walk rays: the grid with what its scan found.
#pragma once

#include "cpu/rays.h"
#include "march.h"

namespace mvdream_fast {
namespace MVDREAM_FAST_ISA {

constexpr int64_t kRaysPerChunk = 64;  // of one thread at a time; results do not depend on it

struct GridOfArgs {
  const MarchArgs& args;
  OccupancyView view;
  bool any;  // cell is occupied

  explicit GridOfArgs(const MarchArgs& args)
      : args(args), view(make_view(args.bits, args.scan->blocks.data(), args.resolution, args.aabb)) {
    const GridScan& scan = *args.scan;
    for (int a = 0; a < 3; ++a) {
      view.clip[a] = view.low[a] + view.size[a] * scan.first[a];
      view.clip[a + 3] = view.low[a] + view.size[a] * (scan.last[a] + 1);
    }
    any = scan.last[0] >= 0;
  }
  GridOfArgs(const GridOfArgs&) = delete;
  GridOfArgs& operator=(const GridOfArgs&) = delete;

  RayWalk walk(int64_t ray) const {
    const float jitter = args.jitter ? args.jitter[ray] : 0.0f;
    const float near = args.near ? args.near[ray] : args.near_all;
    const float far = args.far ? args.far[ray] : args.far_all;
    RayWalk walk = begin_walk(view, args.rays_o + 3 * ray, args.rays_d + 3 * ray, jitter, near, far, args.step);
    if (!any) walk.k_end = 0;
    return walk;
  }
};

}  // namespace MVDREAM_FAST_ISA
}  // namespace mvdream_fast
