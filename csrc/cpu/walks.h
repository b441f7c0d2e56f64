// The arguments of a march, ready to walk rays: the grid with the blocks of cells that hold anything.
#pragma once

#include <vector>

#include "cpu/rays.h"
#include "march.h"

namespace mvdream_fast {
namespace MVDREAM_FAST_ISA {

constexpr int64_t kRaysPerChunk = 64;  // of one thread at a time; results do not depend on it

struct GridOfArgs {
  const MarchArgs& args;
  OccupancyView view;
  std::vector<uint8_t> blocks;

  explicit GridOfArgs(const MarchArgs& args)
      : args(args), view(make_view(args.bits, nullptr, args.resolution, args.aabb)) {
    blocks.assign(static_cast<size_t>(view.n_blocks[0]) * view.n_blocks[1] * view.n_blocks[2], 0);
    int cell[3];
    for (cell[0] = 0; cell[0] < view.n[0]; ++cell[0])
      for (cell[1] = 0; cell[1] < view.n[1]; ++cell[1])
        for (cell[2] = 0; cell[2] < view.n[2]; ++cell[2])
          if (cell_occupied(view, cell)) blocks[block_index(view, cell)] = 1;
    view.blocks = blocks.data();
  }
  GridOfArgs(const GridOfArgs&) = delete;
  GridOfArgs& operator=(const GridOfArgs&) = delete;

  RayWalk walk(int64_t ray) const {
    const float jitter = args.jitter ? args.jitter[ray] : 0.0f;
    const float near = args.near ? args.near[ray] : args.near_all;
    const float far = args.far ? args.far[ray] : args.far_all;
    return begin_walk(view, args.rays_o + 3 * ray, args.rays_d + 3 * ray, jitter, near, far, args.step);
  }
};

}  // namespace MVDREAM_FAST_ISA
}  // namespace mvdream_fast
