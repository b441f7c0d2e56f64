// render on GPUs in one kernel: a lane marches a ray, its warp evaluates the field at the 32 samples of its lanes on
// tensor cores, the lane composites its own. A lane whose ray has ended or become opaque takes the next one, so that
// warps stay full; what a ray adds up depends on no other ray. Nothing per sample is stored.
#include "composite.h"
#include "cuda/networks.cuh"
#include "cuda/ops.h"
#include "cuda/walks.cuh"

namespace mvdream_fast::cuda {
namespace {

using namespace device;

constexpr int kThreads = 128, kMostBlocks = 264;

struct Arguments {
  MarchArgs march;
  OccupancyView grid;
  const float* weights;  // padded
  double least, most;    // optical depths, as in prune_count
  const float* background;
  int64_t background_stride;
  float* rgb;
  float* opacity;
  float* depth;
  unsigned long long* counters;  // rays taken, samples evaluated
};

// A lane's ray on its way.
struct Ray {
  int64_t index = -1;  // none
  RayWalk walk;
  int64_t k = 0, end = 0;  // lattice indices of the run
  RaySums sums;
  double before = 0;  // optical depth of all samples so far
};

__device__ inline void finish(const Arguments& args, Ray* ray) {
  for (int c = 0; c < 3; ++c) {
    const double behind = args.background ? args.background[ray->index * args.background_stride + c] : 0.0;
    args.rgb[3 * ray->index + c] = static_cast<float>(ray->sums.rgb[c] + (1.0 - ray->sums.opacity) * behind);
  }
  args.opacity[ray->index] = static_cast<float>(ray->sums.opacity);
  args.depth[ray->index] = static_cast<float>(ray->sums.depth);
  ray->index = -1;
}

// Moves on to the lane's next sample, on its ray or one after it; false when no ray is left.
__device__ inline bool advance(const Arguments& args, Ray* ray) {
  for (;;) {
    if (ray->index < 0) {
      const int64_t next = static_cast<int64_t>(atomicAdd(args.counters, 1ull));
      if (next >= args.march.n_rays) return false;
      ray->index = next;
      ray->walk = walk_of(args.grid, args.march, next);
      ray->k = ray->end = 0;
      ray->sums = RaySums();
      ray->before = 0;
    }
    if (ray->k < ray->end || next_run(args.grid, &ray->walk, &ray->k, &ray->end)) return true;
    finish(args, ray);
  }
}

// Density and colour of this lane's sample, the warp's 32 in two rounds of 16.
template <int W, bool kTf32>
__device__ inline void evaluate_lanes(const Field& field, const Networks& networks, const float* weights,
                                      const float* position, bool has, float* sigma, float* rgb) {
#pragma unroll 1
  for (int half = 0; half < 2; ++half) {
    if ((__ballot_sync(kAllLanes, has) >> 16 * half & 0xffffu) == 0) continue;
    Sample samples[2];
#pragma unroll
    for (int s = 0; s < 2; ++s) {
      const int source = 16 * half + 8 * s + row_of_lane();
      const float p[3] = {__shfl_sync(kAllLanes, position[0], source), __shfl_sync(kAllLanes, position[1], source),
                          __shfl_sync(kAllLanes, position[2], source)};
      samples[s] = make_sample(field, p, true, 0);
    }
    float density[4], color[4] = {};
    const auto pair = [&](int s, int column, float* out) {
      encode_pair(field.grid, field.table, samples[s].unit, column, out);
    };
    evaluate<W, kTf32>(networks, weights, pair, density, color);
    const int source = lane_index() % 8 * 4;  // of this lane's row, which is lane % 16
    const bool own = lane_index() / 16 == half, second = lane_index() % 16 >= 8;
    const auto take = [&](const float* v, int e, int lane, float* to) {
      const float low = __shfl_sync(kAllLanes, v[e], lane), high = __shfl_sync(kAllLanes, v[e + 2], lane);
      if (own) *to = second ? high : low;
    };
    take(density, 0, source, sigma);
    take(color, 0, source, rgb);
    take(color, 1, source, rgb + 1);
    take(color, 0, source + 1, rgb + 2);
  }
  *sigma = density_of(field, biased(field, position, *sigma));
  for (int c = 0; c < 3; ++c) rgb[c] = field.color_sigmoid ? sigmoid(rgb[c]) : rgb[c];
}

template <int W, bool kTf32, bool kStaged>
__global__ void __launch_bounds__(kThreads)
    render_kernel(const __grid_constant__ Field field, const __grid_constant__ Networks networks,
                  const __grid_constant__ Arguments args) {
  MVDREAM_FAST_DYNAMIC_SHARED(float, shared);
  const float* weights = stage_weights<kStaged>(networks, args.weights, shared);
  Ray ray;
  bool has = true;
  unsigned long long n_samples = 0;
  for (;;) {
    has = has && advance(args, &ray);
    if (__ballot_sync(kAllLanes, has) == 0) break;
    float t0 = 0, t1 = 0, position[3] = {0, 0, 0}, sigma = 0, rgb[3] = {0, 0, 0};
    if (has) {
      t0 = lattice_t(ray.walk.start, ray.walk.step, ray.k);
      t1 = lattice_t(ray.walk.start, ray.walk.step, ++ray.k);
      point_at(args.march.rays_o + 3 * ray.index, args.march.rays_d + 3 * ray.index, 0.5f * (t0 + t1), position);
      ++n_samples;
    }
    evaluate_lanes<W, kTf32>(field, networks, weights, position, has, &sigma, rgb);
    if (!has) continue;
    const float depth = sigma * (t1 - t0);
    if (depth >= args.least) add_sample(&ray.sums, alpha_of(depth), rgb, 0.5f * (t0 + t1));
    ray.before += depth;
    if (!(ray.before <= args.most)) finish(args, &ray);
  }
  n_samples = warp_sum(n_samples);
  if (lane_index() == 0) atomicAdd(args.counters + 1, n_samples);
}

}  // namespace

int64_t render(const Field& field, const MarchArgs& march, double least, double most, const float* background,
               int64_t background_stride, float* rgb, float* opacity, float* depth, Queue queue) {
  const DeviceGuard guard(queue.device);
  const Networks networks = make_networks(field);
  const Scratch<float> weights(networks.size, queue.stream);
  const Scratch<unsigned long long> counters(2, queue.stream);
  const Blocks blocks(march, queue.stream);
  pad_networks(field, networks, weights.get(), queue.stream);
  counters.zero(2);
  const bool staged = fits_shared(networks);
  const OccupancyView grid = make_view(march.bits, blocks.get(), march.resolution, march.aabb);
  const Arguments args = {march, grid,    weights.get(), least,         most, background, background_stride,
                          rgb,   opacity, depth,         counters.get()};
  with_way(networks, queue.tf32, staged, staged, [&](auto width, auto tf32, auto staged, auto) {
    launch("render", render_kernel<width, tf32, staged>, blocks_for(march.n_rays, kThreads, kMostBlocks), kThreads,
           staged ? networks.size * sizeof(float) : 0, queue.stream, field, networks, args);
  });
  unsigned long long taken[2] = {0, 0};
  check(cudaMemcpyAsync(taken, counters.get(), sizeof taken, cudaMemcpyDeviceToHost, queue.stream), "render");
  check(cudaStreamSynchronize(queue.stream), "render");
  return static_cast<int64_t>(taken[1]);
}

}  // namespace mvdream_fast::cuda
