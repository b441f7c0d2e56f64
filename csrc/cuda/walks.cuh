// The arguments of a march, ready to walk rays on a GPU: the grid's blocks of cells, and the walk.
#pragma once

#include "cuda/launch.cuh"
#include "cuda/ops.h"
#include "march.h"

namespace mvdream_fast::cuda {

// Whether none, some or all cells of each block are occupied.
static __global__ void blocks_kernel(const __grid_constant__ MarchArgs args, int64_t n_blocks, uint8_t* blocks) {
  using namespace device;
  const OccupancyView grid = make_view(args.bits, nullptr, args.resolution, args.aabb);
  for (int64_t i = thread_index(); i < n_blocks; i += n_threads()) {
    const int64_t plane = int64_t(grid.n_blocks[1]) * grid.n_blocks[2];
    const int first[3] = {int(i / plane) * kBlock, int(i % plane / grid.n_blocks[2]) * kBlock,
                          int(i % grid.n_blocks[2]) * kBlock};
    int n_occupied = 0;
    int cell[3];
    for (cell[0] = first[0]; cell[0] < first[0] + kBlock && cell[0] < grid.n[0]; ++cell[0])
      for (cell[1] = first[1]; cell[1] < first[1] + kBlock && cell[1] < grid.n[1]; ++cell[1])
        for (cell[2] = first[2]; cell[2] < first[2] + kBlock && cell[2] < grid.n[2]; ++cell[2])
          n_occupied += cell_occupied(grid, cell);
    blocks[i] = n_occupied == 0 ? kBlockEmpty : n_occupied == kBlock * kBlock * kBlock ? kBlockFull : kBlockMixed;
  }
}

class Blocks {
 public:
  Blocks(const MarchArgs& args, cudaStream_t stream) : n_(count(args)), blocks_(n_, stream) {
    launch("occupied blocks", blocks_kernel, blocks_for(n_, 128), 128, 0, stream, args, n_, blocks_.get());
  }
  const uint8_t* get() const { return blocks_.get(); }

 private:
  static int64_t count(const MarchArgs& args) {
    int64_t n = 1;
    for (int a = 0; a < 3; ++a) n *= (args.resolution[a] + device::kBlock - 1) / device::kBlock;
    return n;
  }
  int64_t n_;
  Scratch<uint8_t> blocks_;
};

__device__ inline device::RayWalk walk_of(const device::OccupancyView& grid, const MarchArgs& args, int64_t ray) {
  const float jitter = args.jitter ? args.jitter[ray] : 0.0f;
  const float near = args.near ? args.near[ray] : args.near_all;
  const float far = args.far ? args.far[ray] : args.far_all;
  return device::begin_walk(grid, args.rays_o + 3 * ray, args.rays_d + 3 * ray, jitter, near, far, args.step);
}

}  // namespace mvdream_fast::cuda
