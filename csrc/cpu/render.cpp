// render on CPUs: rounds of a few samples for every ray still alive, so that a field is evaluated on large batches and
// a ray that has become opaque costs nothing more. Adds up exactly what march, prune and composite in a row add up.
#include <cstring>

#include "composite.h"
#include "cpu/walks.h"

namespace mvdream_fast {
namespace MVDREAM_FAST_ISA {

// Up to per_round samples of a ray from its cursor on, which moves behind them; returns their number.
static int64_t march_on(const GridOfArgs& grid, const RenderRound& round, int64_t ray, float* slots) {
  RayWalk walk = grid.walk(ray);
  if (walk.k < round.cursor[ray]) walk.k = round.cursor[ray];
  int64_t begin, end, n = 0;
  while (n < round.per_round && next_run(grid.view, &walk, &begin, &end)) {
    const int64_t room = round.per_round - n;
    if (end - begin > room) end = walk.k = begin + room;
    for (int64_t k = begin; k < end; ++k, ++n) {
      slots[2 * n] = lattice_t(walk.start, walk.step, k);
      slots[2 * n + 1] = lattice_t(walk.start, walk.step, k + 1);
    }
  }
  round.cursor[ray] = n < round.per_round ? -1 : walk.k;
  return n;
}

int64_t render_march(const MarchArgs& args, const RenderRound& round) {
  const GridOfArgs grid(args);
#pragma omp parallel for schedule(dynamic, kRaysPerChunk) num_threads(args.n_threads)
  for (int64_t i = 0; i < round.n_live; ++i)
    round.offsets[i + 1] = march_on(grid, round, round.live[i], round.slots + 2 * round.per_round * i);
  round.offsets[0] = 0;
  for (int64_t i = 0; i < round.n_live; ++i) round.offsets[i + 1] += round.offsets[i];
  return round.offsets[round.n_live];
}

void render_positions(const MarchArgs& args, const RenderRound& round, float* positions) {
#pragma omp parallel for schedule(static) num_threads(args.n_threads)
  for (int64_t i = 0; i < round.n_live; ++i) {
    const float* slots = round.slots + 2 * round.per_round * i;
    const int64_t ray = 3 * round.live[i], first = round.offsets[i], n = round.offsets[i + 1] - first;
    for (int64_t j = 0; j < n; ++j) {
      const float t = 0.5f * (slots[2 * j] + slots[2 * j + 1]);
      point_at(args.rays_o + ray, args.rays_d + ray, t, positions + 3 * (first + j));
    }
  }
}

static void gather(const RenderRound& round, int64_t i, const float* sigmas, const float* rgb, double least,
                   double most) {
  double* state = round.state + kRenderState * round.live[i];
  const float* slots = round.slots + 2 * round.per_round * i;
  RaySums sums;
  double before = state[0];
  sums.transmittance = state[1];
  std::memcpy(sums.rgb, state + 2, sizeof sums.rgb);
  sums.opacity = state[5];
  sums.depth = state[6];
  for (int64_t s = round.offsets[i]; s < round.offsets[i + 1] && before <= most; ++s, slots += 2) {
    const float depth = sigmas[s] * (slots[1] - slots[0]);
    if (depth >= least) add_sample(&sums, alpha_of(depth), rgb + 3 * s, 0.5f * (slots[0] + slots[1]));
    before += depth;
  }
  if (!(before <= most)) round.cursor[round.live[i]] = -1;
  state[0] = before;
  state[1] = sums.transmittance;
  std::memcpy(state + 2, sums.rgb, sizeof sums.rgb);
  state[5] = sums.opacity;
  state[6] = sums.depth;
}

void render_composite(const RenderRound& round, const float* sigmas, const float* rgb, double least, double most,
                      int n_threads) {
#pragma omp parallel for schedule(dynamic, kRaysPerChunk) num_threads(n_threads)
  for (int64_t i = 0; i < round.n_live; ++i) gather(round, i, sigmas, rgb, least, most);
}

void render_finish(const double* state, int64_t n_rays, const float* background, int64_t background_stride, float* rgb,
                   float* opacity, float* depth) {
  for (int64_t ray = 0; ray < n_rays; ++ray, state += kRenderState) {
    for (int c = 0; c < 3; ++c) {
      const double behind = background ? background[ray * background_stride + c] : 0.0;
      rgb[3 * ray + c] = static_cast<float>(state[2 + c] + (1.0 - state[5]) * behind);
    }
    opacity[ray] = static_cast<float>(state[5]);
    depth[ray] = static_cast<float>(state[6]);
  }
}

}  // namespace MVDREAM_FAST_ISA
}  // namespace mvdream_fast
