// march_rays and prune_samples on CPUs: count the samples of every ray, then fill them in.
#include "cpu/walks.h"

namespace mvdream_fast {
namespace MVDREAM_FAST_ISA {

static int ray_status(const MarchArgs& args, int64_t ray) {
  return status_of_ray(args.rays_o + 3 * ray, args.rays_d + 3 * ray, args.jitter ? args.jitter[ray] : 0.0f,
                       args.near ? args.near[ray] : args.near_all, args.far ? args.far[ray] : args.far_all, args.aabb,
                       args.step);
}

int march_status(const MarchArgs& args) {
  int worst = kMarchFine;
#pragma omp parallel for schedule(static) num_threads(args.n_threads) reduction(max : worst)
  for (int64_t ray = 0; ray < args.n_rays; ++ray) {
    const int status = ray_status(args, ray);
    worst = status > worst ? status : worst;
  }
  return worst;
}

int march_count(const MarchArgs& args, int64_t* counts) {
  const int status = march_status(args);
  if (status != kMarchFine) return status;
  const GridOfArgs grid(args);
#pragma omp parallel for schedule(dynamic, kRaysPerChunk) num_threads(args.n_threads)
  for (int64_t ray = 0; ray < args.n_rays; ++ray) {
    RayWalk walk = grid.walk(ray);
    int64_t begin, end, count = 0;
    while (count < args.max_samples && next_run(grid.view, &walk, &begin, &end)) count += end - begin;
    counts[ray] = count < args.max_samples ? count : args.max_samples;
  }
  return kMarchFine;
}

void march_fill(const MarchArgs& args, const int64_t* packed_info, float* t_starts, float* t_ends) {
  const GridOfArgs grid(args);
#pragma omp parallel for schedule(dynamic, kRaysPerChunk) num_threads(args.n_threads)
  for (int64_t ray = 0; ray < args.n_rays; ++ray) {
    int64_t i = packed_info[2 * ray];
    const int64_t last = i + packed_info[2 * ray + 1];
    if (i == last) continue;
    RayWalk walk = grid.walk(ray);
    int64_t begin, end;
    while (i < last && next_run(grid.view, &walk, &begin, &end)) {
      const int64_t n = end - begin < last - i ? end - begin : last - i;
      for (int64_t j = 0; j < n; ++j) {
        t_starts[i + j] = lattice_t(walk.start, walk.step, begin + j);
        t_ends[i + j] = lattice_t(walk.start, walk.step, begin + j + 1);
      }
      i += n;
    }
  }
}

void sample_positions(const Packed& samples, const float* rays_o, const float* rays_d, float* positions) {
#pragma omp parallel for schedule(dynamic, kRaysPerChunk) num_threads(samples.n_threads)
  for (int64_t ray = 0; ray < samples.n_rays; ++ray) {
    const int64_t first = samples.packed_info[2 * ray], last = first + samples.packed_info[2 * ray + 1];
    for (int64_t i = first; i < last; ++i) {
      const float t = 0.5f * (samples.t_starts[i] + samples.t_ends[i]);
      point_at(rays_o + 3 * ray, rays_d + 3 * ray, t, positions + 3 * i);
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

void prune_fill(const Packed& samples, const uint8_t* keep, const int64_t* packed_info, float* t_starts,
                float* t_ends) {
#pragma omp parallel for schedule(dynamic, kRaysPerChunk) num_threads(samples.n_threads)
  for (int64_t ray = 0; ray < samples.n_rays; ++ray) {
    const int64_t first = samples.packed_info[2 * ray], last = first + samples.packed_info[2 * ray + 1];
    int64_t out = packed_info[2 * ray];
    for (int64_t i = first; i < last; ++i) {
      if (!keep[i]) continue;
      t_starts[out] = samples.t_starts[i];
      t_ends[out++] = samples.t_ends[i];
    }
  }
}

}  // namespace MVDREAM_FAST_ISA
}  // namespace mvdream_fast
