// march_rays and prune_samples on CPUs: count the samples of every ray, then fill them in.
#include "march.h"

#include <atomic>
#include <vector>

#include "cpu/rays.h"

namespace mvdream_fast {
namespace MVDREAM_FAST_ISA {

static constexpr int64_t kRaysPerChunk = 64;

// Which blocks of kBlock^3 cells hold any occupied cell.
static std::vector<uint8_t> occupied_blocks(const OccupancyView& grid) {
  std::vector<uint8_t> blocks(static_cast<size_t>(grid.n_blocks[0]) * grid.n_blocks[1] * grid.n_blocks[2], 0);
  int cell[3];
  for (cell[0] = 0; cell[0] < grid.n[0]; ++cell[0])
    for (cell[1] = 0; cell[1] < grid.n[1]; ++cell[1])
      for (cell[2] = 0; cell[2] < grid.n[2]; ++cell[2]) {
        if (!cell_occupied(grid, cell)) continue;
        const int64_t row = static_cast<int64_t>(cell[0] / kBlock) * grid.n_blocks[1] + cell[1] / kBlock;
        blocks[row * grid.n_blocks[2] + cell[2] / kBlock] = 1;
      }
  return blocks;
}

static RayWalk walk_of(const MarchArgs& args, const OccupancyView& grid, int64_t ray) {
  const float jitter = args.jitter ? args.jitter[ray] : 0.0f;
  const float near = args.near ? args.near[ray] : args.near_all;
  const float far = args.far ? args.far[ray] : args.far_all;
  return begin_walk(grid, args.rays_o + 3 * ray, args.rays_d + 3 * ray, jitter, near, far, args.step);
}

static int ray_status(const MarchArgs& args, int64_t ray) {
  const float *o = args.rays_o + 3 * ray, *d = args.rays_d + 3 * ray;
  float finite = 0;
  for (int a = 0; a < 3; ++a) finite += 0.0f * o[a] + 0.0f * d[a];  // NaN if anything is infinite or NaN
  if (args.near) finite += 0.0f * args.near[ray];
  if (!(finite == 0.0f)) return kMarchNotFinite;
  if (d[0] == 0 && d[1] == 0 && d[2] == 0) return kMarchNoDirection;
  if (args.jitter && !(args.jitter[ray] >= 0 && args.jitter[ray] <= 1)) return kMarchJitter;
  return kMarchFine;
}

int march_count(const MarchArgs& args, int64_t* counts) {
  OccupancyView grid = make_view(args.bits, nullptr, args.resolution, args.aabb);
  const std::vector<uint8_t> blocks = occupied_blocks(grid);
  grid.blocks = blocks.data();
  std::atomic<int> worst{kMarchFine};
#pragma omp parallel for schedule(dynamic, kRaysPerChunk) num_threads(args.n_threads)
  for (int64_t ray = 0; ray < args.n_rays; ++ray) {
    counts[ray] = 0;
    const int status = ray_status(args, ray);
    if (status != kMarchFine) {
      worst = status;
      continue;
    }
    RayWalk walk = walk_of(args, grid, ray);
    int64_t begin, end, count = 0;
    while (count < args.max_samples && next_run(grid, &walk, &begin, &end)) count += end - begin;
    counts[ray] = count < args.max_samples ? count : args.max_samples;
  }
  return worst;
}

void march_fill(const MarchArgs& args, const int64_t* packed_info, int64_t* ray_indices, float* t_starts,
                float* t_ends) {
  OccupancyView grid = make_view(args.bits, nullptr, args.resolution, args.aabb);
  const std::vector<uint8_t> blocks = occupied_blocks(grid);
  grid.blocks = blocks.data();
#pragma omp parallel for schedule(dynamic, kRaysPerChunk) num_threads(args.n_threads)
  for (int64_t ray = 0; ray < args.n_rays; ++ray) {
    int64_t i = packed_info[2 * ray];
    const int64_t last = i + packed_info[2 * ray + 1];
    if (i == last) continue;
    RayWalk walk = walk_of(args, grid, ray);
    int64_t begin, end;
    while (i < last && next_run(grid, &walk, &begin, &end)) {
      const int64_t n = end - begin < last - i ? end - begin : last - i;
      for (int64_t j = 0; j < n; ++j) {
        t_starts[i + j] = lattice_t(walk.start, walk.step, begin + j);
        t_ends[i + j] = lattice_t(walk.start, walk.step, begin + j + 1);
        ray_indices[i + j] = ray;
      }
      i += n;
    }
  }
}

void prune_count(const Packed& samples, const float* sigmas, double least, double most, uint8_t* keep,
                 int64_t* counts) {
#pragma omp parallel for schedule(dynamic, kRaysPerChunk) num_threads(samples.n_threads)
  for (int64_t ray = 0; ray < samples.n_rays; ++ray) {
    const int64_t first = samples.packed_info[2 * ray], last = first + samples.packed_info[2 * ray + 1];
    double before = 0;
    int64_t count = 0;
    for (int64_t i = first; i < last; ++i) {
      const double depth = sigmas[i] * (samples.t_ends[i] - samples.t_starts[i]);
      keep[i] = depth >= least && before <= most;
      count += keep[i];
      before += depth;
    }
    counts[ray] = count;
  }
}

void prune_fill(const Packed& samples, const uint8_t* keep, const int64_t* packed_info, int64_t* ray_indices,
                float* t_starts, float* t_ends) {
#pragma omp parallel for schedule(dynamic, kRaysPerChunk) num_threads(samples.n_threads)
  for (int64_t ray = 0; ray < samples.n_rays; ++ray) {
    const int64_t first = samples.packed_info[2 * ray], last = first + samples.packed_info[2 * ray + 1];
    int64_t out = packed_info[2 * ray];
    for (int64_t i = first; i < last; ++i) {
      if (!keep[i]) continue;
      t_starts[out] = samples.t_starts[i];
      t_ends[out] = samples.t_ends[i];
      ray_indices[out++] = ray;
    }
  }
}

}  // namespace MVDREAM_FAST_ISA
}  // namespace mvdream_fast
