// march_rays, traverse_grids and prune_samples on GPUs: a thread takes a ray and makes the CPU's steps in the CPU's
// order, so that both find the same samples to the bit.
#include "cuda/launch.cuh"
#include "cuda/ops.h"
#include "cuda/walks.cuh"
#include "march.h"

namespace mvdream_fast::cuda {
namespace {

using namespace device;

constexpr int kThreads = 128;
using Worst = unsigned long long;  // the highest MarchStatus of all rays, of a size that atomics know

__device__ int ray_status(const MarchArgs& args, int64_t ray) {
  return status_of_ray(args.rays_o + 3 * ray, args.rays_d + 3 * ray, args.jitter ? args.jitter[ray] : 0.0f,
                       args.near ? args.near[ray] : args.near_all, args.far ? args.far[ray] : args.far_all, args.aabb,
                       args.step);
}

__global__ void __launch_bounds__(kThreads) march_status_kernel(MarchArgs args, Worst* worst) {
  for (int64_t ray = thread_index(); ray < args.n_rays; ray += n_threads()) {
    const int status = ray_status(args, ray);
    if (status != kMarchFine) atomicMax(worst, Worst(status));
  }
}

__global__ void __launch_bounds__(kThreads)
    march_count_kernel(const __grid_constant__ MarchArgs args, const uint8_t* blocks, int64_t* counts,
                       const Worst* worst) {
  if (*worst != kMarchFine) {  // no ray is walked: the steps of one that cannot be may have no end
    for (int64_t ray = thread_index(); ray < args.n_rays; ray += n_threads()) counts[ray] = 0;
    return;
  }
  const OccupancyView grid = make_view(args.bits, blocks, args.resolution, args.aabb);
  for (int64_t ray = thread_index(); ray < args.n_rays; ray += n_threads()) {
    RayWalk walk = walk_of(grid, args, ray);
    int64_t begin, end, count = 0;
    while (count < args.max_samples && next_run(grid, &walk, &begin, &end)) count += end - begin;
    counts[ray] = count < args.max_samples ? count : args.max_samples;
  }
}

__global__ void __launch_bounds__(kThreads)
    march_fill_kernel(const __grid_constant__ MarchArgs args, const uint8_t* blocks, const int64_t* packed_info,
                      float* t_starts, float* t_ends) {
  const OccupancyView grid = make_view(args.bits, blocks, args.resolution, args.aabb);
  for (int64_t ray = thread_index(); ray < args.n_rays; ray += n_threads()) {
    int64_t i = packed_info[2 * ray];
    const int64_t last = i + packed_info[2 * ray + 1];
    if (i == last) continue;
    RayWalk walk = walk_of(grid, args, ray);
    int64_t begin, end;
    while (i < last && next_run(grid, &walk, &begin, &end)) {
      for (int64_t k = begin; k < end && i < last; ++k, ++i) {
        t_starts[i] = lattice_t(walk.start, walk.step, k);
        t_ends[i] = lattice_t(walk.start, walk.step, k + 1);
      }
    }
  }
}

__global__ void __launch_bounds__(kThreads)
    sample_positions_kernel(Packed samples, const float* rays_o, const float* rays_d, float* positions) {
  for (int64_t ray = warp_index(); ray < samples.n_rays; ray += n_warps()) {
    const int64_t first = samples.packed_info[2 * ray], last = first + samples.packed_info[2 * ray + 1];
    for (int64_t i = first + lane_index(); i < last; i += kWarp) {
      const float t = 0.5f * (samples.t_starts[i] + samples.t_ends[i]);
      point_at(rays_o + 3 * ray, rays_d + 3 * ray, t, positions + 3 * i);
    }
  }
}

__global__ void __launch_bounds__(kThreads)
    prune_count_kernel(Packed samples, const float* sigmas, double least, double most, uint8_t* keep, int64_t* counts) {
  for (int64_t ray = thread_index(); ray < samples.n_rays; ray += n_threads()) {
    const int64_t first = samples.packed_info[2 * ray], last = first + samples.packed_info[2 * ray + 1];
    double before = 0;
    int64_t count = 0;
    for (int64_t i = first; i < last; ++i) {
      const double depth = sigmas[i] * (samples.t_ends[i] - samples.t_starts[i]);
      const bool kept = depth >= least && before <= most;
      keep[i] = kept;
      count += kept;
      before += depth;
    }
    counts[ray] = count;
  }
}

__global__ void __launch_bounds__(kThreads)
    prune_fill_kernel(Packed samples, const uint8_t* keep, const int64_t* packed_info, float* t_starts, float* t_ends) {
  for (int64_t ray = thread_index(); ray < samples.n_rays; ray += n_threads()) {
    const int64_t first = samples.packed_info[2 * ray], last = first + samples.packed_info[2 * ray + 1];
    int64_t out = packed_info[2 * ray];
    for (int64_t i = first; i < last; ++i) {
      if (!keep[i]) continue;
      t_starts[out] = samples.t_starts[i];
      t_ends[out++] = samples.t_ends[i];
    }
  }
}

__global__ void __launch_bounds__(kThreads) traverse_kernel(const __grid_constant__ TraverseArgs args) {
  const GridStack grids = grids_of(args);
  const bool fine = boxes_fine(grids);
  int worst = fine ? kMarchFine : kMarchBox;
  for (int64_t ray = thread_index(); ray < args.n_rays; ray += n_threads()) {
    const int status = traverse_ray(args, grids, fine, ray);
    worst = status > worst ? status : worst;
  }
  if (worst != kMarchFine) atomicMax(args.status, worst);
}

}  // namespace

static void find_worst(const MarchArgs& args, Worst* worst, Queue queue) {
  check(cudaMemsetAsync(worst, 0, sizeof *worst, queue.stream), "march status");
  launch("march status", march_status_kernel, blocks_for(args.n_rays, kThreads), kThreads, 0, queue.stream, args,
         worst);
}

int march_status(const MarchArgs& args, Queue queue) {
  const DeviceGuard guard(queue.device);
  const Scratch<Worst> worst(1, queue.stream);
  find_worst(args, worst.get(), queue);
  Worst status = kMarchFine;
  check(cudaMemcpyAsync(&status, worst.get(), sizeof status, cudaMemcpyDeviceToHost, queue.stream), "march status");
  check(cudaStreamSynchronize(queue.stream), "march status");
  return static_cast<int>(status);
}

void march_count(const MarchArgs& args, int64_t* counts, int64_t* status, Queue queue) {
  const DeviceGuard guard(queue.device);
  Worst* const worst = reinterpret_cast<Worst*>(status);
  find_worst(args, worst, queue);
  const Blocks blocks(args, queue.stream);
  launch("march count", march_count_kernel, blocks_for(args.n_rays, kThreads), kThreads, 0, queue.stream, args,
         blocks.get(), counts, worst);
}

void march_fill(const MarchArgs& args, const int64_t* packed_info, float* t_starts, float* t_ends, Queue queue) {
  const DeviceGuard guard(queue.device);
  const Blocks blocks(args, queue.stream);
  launch("march fill", march_fill_kernel, blocks_for(args.n_rays, kThreads), kThreads, 0, queue.stream, args,
         blocks.get(), packed_info, t_starts, t_ends);
}

void sample_positions(const Packed& samples, const float* rays_o, const float* rays_d, float* positions, Queue queue) {
  const DeviceGuard guard(queue.device);
  launch("sample positions", sample_positions_kernel, blocks_for(samples.n_rays, kThreads / kWarp), kThreads, 0,
         queue.stream, samples, rays_o, rays_d, positions);
}

void prune_count(const Packed& samples, const float* sigmas, double least, double most, uint8_t* keep, int64_t* counts,
                 Queue queue) {
  const DeviceGuard guard(queue.device);
  launch("prune count", prune_count_kernel, blocks_for(samples.n_rays, kThreads), kThreads, 0, queue.stream, samples,
         sigmas, least, most, keep, counts);
}

void prune_fill(const Packed& samples, const uint8_t* keep, const int64_t* packed_info, float* t_starts, float* t_ends,
                Queue queue) {
  const DeviceGuard guard(queue.device);
  launch("prune fill", prune_fill_kernel, blocks_for(samples.n_rays, kThreads), kThreads, 0, queue.stream, samples,
         keep, packed_info, t_starts, t_ends);
}

void traverse(const TraverseArgs& args, Queue queue) {
  const DeviceGuard guard(queue.device);
  // A block even without rays: every thread looks at the boxes.
  const int64_t n_blocks = blocks_for(args.n_rays > 0 ? args.n_rays : 1, kThreads);
  launch("traverse", traverse_kernel, n_blocks, kThreads, 0, queue.stream, args);
}

}  // namespace mvdream_fast::cuda
