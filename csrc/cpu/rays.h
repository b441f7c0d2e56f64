// CPU entry points of the packed-sample ops. Pointers are to contiguous arrays, letters as in CONTRIBUTING.md; rays are
// worked on in parallel in fixed chunks and every output belongs to one ray, so results do not depend on n_threads.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/dispatch.h"

namespace mvdream_fast {

// What is known of an occupancy grid before any ray is looked at; made once for all the calls of a march.
struct GridScan {
  std::vector<uint8_t> blocks;  // as in march.h
  int first[3], last[3];        // of the occupied cells; last is below first where there is none
};

struct MarchArgs {
  const float* rays_o;  // [R, 3]
  const float* rays_d;  // [R, 3]
  const float* jitter;  // [R] or null
  const float* near;    // [R] or null, then near_all
  const float* far;     // [R] or null, then far_all
  float near_all, far_all;
  int64_t n_rays;
  const uint8_t* bits;
  int resolution[3];
  float aabb[6];
  float step;
  int64_t max_samples;  // of one ray
  int n_threads;
  const GridScan* scan = nullptr;  // on CPUs
};

struct Packed {
  const float* t_starts;       // [S]
  const float* t_ends;         // [S]
  const int64_t* packed_info;  // [R, 2]: start and count, without gaps
  int64_t n_rays;
  int n_threads;
};

// A chunk of rays while it is rendered without gradients: `live` names the rays that still march, and every round
// gives each of them up to `per_round` samples. What a ray has gathered is in `state`, its place in `cursor`.
struct RenderRound {
  const int64_t* live;  // [n_live]
  int64_t n_live;
  int64_t per_round;
  int64_t* cursor;   // [R]: next lattice index to look at; -1 when the ray is done
  int64_t* offsets;  // [n_live + 1]: first sample of each live ray in this round
  float* slots;      // [n_live, per_round, 2]: t_start and t_end
  double* state;     // [R, kRenderState]
};

constexpr int kRenderState = 7;  // optical depth of all samples, transmittance of the kept, rgb, opacity, depth

struct CompositeForward {
  const float* sigmas;      // [S]
  const float* rgb;         // [S, 3]
  const float* background;  // rows of 3 at this stride (0: one for all), or null
  int64_t background_stride;
  float* out_rgb;         // [R, 3]
  float* out_opacity;     // [R]
  float* out_depth;       // [R]
  float* out_weights;     // [S]
  float* out_z_variance;  // [R]
};

struct CompositeBackward {
  const float* sigmas;
  const float* rgb;
  const float* background;
  int64_t background_stride;
  const float* opacity;  // [R], of the forward pass
  const float* depth;    // [R]
  const float* d_rgb;    // cotangents, each null where nothing flows
  const float* d_opacity;
  const float* d_depth;
  const float* d_weights;
  const float* d_z_variance;
  float* d_sigmas;      // [S]
  float* d_colors;      // [S, 3]
  float* d_background;  // [R, 3] or null
};

}  // namespace mvdream_fast

// The scan of the arguments' grid, for their `scan`.
MVDREAM_FAST_CPU_OP(void, scan_grid, const mvdream_fast::MarchArgs& args, mvdream_fast::GridScan* scan)

// Whether the rays can be marched: the highest MarchStatus (march.h) of them.
MVDREAM_FAST_CPU_OP(int, march_status, const mvdream_fast::MarchArgs& args)

// Samples of each ray, [R]; returns a MarchStatus.
MVDREAM_FAST_CPU_OP(int, march_count, const MarchArgs& args, int64_t* counts)
MVDREAM_FAST_CPU_OP(void, march_fill, const MarchArgs& args, const int64_t* packed_info, float* t_starts, float* t_ends)

// Midpoints of the samples, [S, 3].
MVDREAM_FAST_CPU_OP(void, sample_positions, const mvdream_fast::Packed& samples, const float* rays_o,
                    const float* rays_d, float* positions)

// Thresholds are optical depths: a sample stays when its own is at least `least` and that before it at most `most`.
MVDREAM_FAST_CPU_OP(void, prune_count, const Packed& samples, const float* sigmas, double least, double most,
                    uint8_t* keep, int64_t* counts)
MVDREAM_FAST_CPU_OP(void, prune_fill, const Packed& samples, const uint8_t* keep, const int64_t* packed_info,
                    float* t_starts, float* t_ends)

MVDREAM_FAST_CPU_OP(void, composite_forward, const Packed& samples, const CompositeForward& args)
MVDREAM_FAST_CPU_OP(void, composite_backward, const Packed& samples, const CompositeBackward& args)

// One round: march every live ray on; returns the number of samples. Then their midpoints [S, 3]; then their field's
// values on top of the state, ending rays behind `most` (thresholds as in prune_count); at last the pixels.
MVDREAM_FAST_CPU_OP(int64_t, render_march, const mvdream_fast::MarchArgs& args, const mvdream_fast::RenderRound& round)
MVDREAM_FAST_CPU_OP(void, render_positions, const mvdream_fast::MarchArgs& args, const mvdream_fast::RenderRound& round,
                    float* positions)
MVDREAM_FAST_CPU_OP(void, render_composite, const mvdream_fast::RenderRound& round, const float* sigmas,
                    const float* rgb, double least, double most, int n_threads)
MVDREAM_FAST_CPU_OP(void, render_finish, const double* state, int64_t n_rays, const float* background,
                    int64_t background_stride, float* rgb, float* opacity, float* depth)

// cells may be null: then value i belongs to cell i and n_values is n_cells.
MVDREAM_FAST_CPU_OP(void, update_occupancy, const float* ema, int64_t n_cells, const float* values,
                    const int64_t* cells, int64_t n_values, float decay, float threshold, float* new_ema, uint8_t* bits)
