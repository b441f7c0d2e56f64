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
  bool any;  // cell is occupied

  explicit GridOfArgs(const MarchArgs& args)
      : args(args), view(make_view(args.bits, nullptr, args.resolution, args.aabb)) {
    std::vector<uint8_t> counts(static_cast<size_t>(view.n_blocks[0]) * view.n_blocks[1] * view.n_blocks[2], 0);
    int first[3] = {view.n[0], view.n[1], view.n[2]}, last[3] = {-1, -1, -1}, cell[3];
    for (cell[0] = 0; cell[0] < view.n[0]; ++cell[0])
      for (cell[1] = 0; cell[1] < view.n[1]; ++cell[1])
        for (cell[2] = 0; cell[2] < view.n[2]; ++cell[2]) {
          if (!cell_occupied(view, cell)) continue;
          ++counts[block_index(view, cell)];
          for (int a = 0; a < 3; ++a) {
            first[a] = cell[a] < first[a] ? cell[a] : first[a];
            last[a] = cell[a] > last[a] ? cell[a] : last[a];
          }
        }
    constexpr int whole = kBlock * kBlock * kBlock;
    blocks.resize(counts.size());
    for (size_t i = 0; i < counts.size(); ++i)
      blocks[i] = counts[i] == 0 ? kBlockEmpty : counts[i] == whole ? kBlockFull : kBlockMixed;
    view.blocks = blocks.data();
    for (int a = 0; a < 3; ++a) {
      view.clip[a] = view.low[a] + view.size[a] * first[a];
      view.clip[a + 3] = view.low[a] + view.size[a] * (last[a] + 1);
    }
    any = last[0] >= 0;
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
