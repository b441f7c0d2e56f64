// Traversal of several nested occupancy grids as nerfacc's users know it: steps that may grow with the distance, or one
// interval per cell; edges and samples of the intervals found. The plain case, one grid and a fixed step, is march.h's.
//
// Between two crossings of boxes a ray is in one grid: the first in the list that holds it. Inside, cell by cell, the
// ray steps until its next midpoint is past the cell; in an occupied cell every step is a sample.
#pragma once

#include <cmath>

#include "march.h"

namespace mvdream_fast {

struct TraverseArgs {
  const float* rays_o;   // [R, 3]
  const float* rays_d;   // [R, 3]
  const uint8_t* mask;   // [R], or null for all rays
  const float* near;     // [R]
  const float* far;      // [R]
  const uint8_t* cells;  // [n_grids, n[0], n[1], n[2]]
  const float* aabbs;    // [n_grids, 6]
  int64_t n_rays;
  int n_grids;
  int n[3];
  float step, cone;
  int64_t limit;  // samples of a ray, negative for none
  int64_t* n_edges;
  int64_t* n_samples;
  float* t_last;  // [R]
  int* status;    // [1], raised to the highest MarchStatus of the rays; those with another than kMarchFine have nothing
  // Filled where not null.
  const int64_t* edge_starts;
  const int64_t* sample_starts;
  float* edges;
  uint8_t* is_left;
  uint8_t* is_right;
  float* mids;
  int n_threads;
};

namespace MVDREAM_FAST_ISA {

constexpr int kMaxGrids = 16;

struct GridStack {
  const uint8_t* cells;  // [n_grids, n[0], n[1], n[2]], one byte each
  const float* aabbs;    // [n_grids, 6]
  int n_grids;
  int n[3];
};

struct Traversal {
  float step, cone;  // step <= 0: one interval per cell
  int64_t limit;     // samples of a ray
};

// What a traversal emits; null pointers only count.
struct TraversalSink {
  float* edges = nullptr;
  uint8_t* is_left = nullptr;
  uint8_t* is_right = nullptr;
  float* mids = nullptr;
  int64_t n_edges = 0, n_samples = 0;
  bool open = false;  // the last edge is also where the next interval starts

  MVDREAM_FAST_HD void edge(float t, bool left) {
    if (edges) {
      edges[n_edges] = t;
      is_left[n_edges] = left;
      is_right[n_edges] = !left;
    }
    ++n_edges;
  }

  MVDREAM_FAST_HD void interval(float t0, float t1) {
    if (!open) {
      edge(t0, true);
    } else if (edges) {
      is_left[n_edges - 1] = true;
    }
    edge(t1, false);
    if (mids) mids[n_samples] = 0.5f * (t0 + t1);
    ++n_samples;
    open = true;
  }
};

// Distances at which a ray enters and leaves a box; false where it misses it or leaves it behind the origin.
MVDREAM_FAST_HD bool box_range(const float* o, const float* d, const float* box, double* enter, double* exit) {
  *enter = -INFINITY;
  *exit = INFINITY;
  for (int a = 0; a < 3; ++a) {
    if (d[a] == 0) {
      if (o[a] < box[a] || o[a] > box[a + 3]) return false;
      continue;
    }
    const double inv = 1.0 / d[a];
    const double t0 = (static_cast<double>(box[a]) - o[a]) * inv, t1 = (static_cast<double>(box[a + 3]) - o[a]) * inv;
    *enter = fmax(*enter, fmin(t0, t1));
    *exit = fmin(*exit, fmax(t0, t1));
  }
  return *exit > *enter && *exit > 0;
}

struct RayTraversal {
  const GridStack& grids;
  const Traversal& rules;
  const float *o, *d;
  double near, far, t_last;
  TraversalSink& sink;

  MVDREAM_FAST_HD double step_at(double t) const { return fmax(t * rules.cone, static_cast<double>(rules.step)); }
  MVDREAM_FAST_HD bool full() const { return sink.n_samples >= rules.limit; }

  // Moves to the first lattice point whose midpoint isn't before t, by steps of the size that holds here.
  MVDREAM_FAST_HD void skip_to(double t) {
    sink.open = false;
    if (rules.step <= 0) {
      t_last = t;
      return;
    }
    const double dt = step_at(t_last);
    const double n = ceil((t - t_last) / dt - 0.5);
    if (n > 0) t_last += n * dt;
  }

  MVDREAM_FAST_HD void sample_to(double t) {
    while (!full()) {
      double next = t;
      if (rules.step > 0) {
        const double dt = step_at(t_last);
        if (t_last + 0.5 * dt >= t) return;
        next = t_last + dt;
      }
      sink.interval(static_cast<float>(t_last), static_cast<float>(next));
      t_last = next;
      if (next >= t) return;
    }
  }

  // The cells of one grid between two distances.
  MVDREAM_FAST_HD void cells_between(int level, double from, double to) {
    const float* box = grids.aabbs + 6 * level;
    int cell[3], last_axis = 0;
    double next[3];
    for (int a = 0; a < 3; ++a) {
      const double size = (static_cast<double>(box[a + 3]) - box[a]) / grids.n[a];
      const double x = (o[a] + d[a] * (from + 1e-9 * (to - from)) - box[a]) / size;
      cell[a] = x <= 0 ? 0 : x >= grids.n[a] ? grids.n[a] - 1 : static_cast<int>(x);
      next[a] = d[a] == 0 ? INFINITY : (box[a] + size * (cell[a] + (d[a] > 0)) - o[a]) / d[a];
    }
    while (!full()) {
      last_axis = next[0] < next[1] ? (next[0] < next[2] ? 0 : 2) : (next[1] < next[2] ? 1 : 2);
      const double end = fmin(next[last_axis], to);
      const int64_t row = (static_cast<int64_t>(level) * grids.n[0] + cell[0]) * grids.n[1] + cell[1];
      if (end > from || rules.step > 0) {
        if (grids.cells[row * grids.n[2] + cell[2]]) {
          sample_to(end);
        } else {
          skip_to(end);
        }
      }
      from = fmax(from, end);
      if (end >= to) return;
      const int a = last_axis;
      cell[a] += d[a] > 0 ? 1 : -1;
      if (cell[a] < 0 || cell[a] >= grids.n[a]) return;
      const double size = (static_cast<double>(box[a + 3]) - box[a]) / grids.n[a];
      next[a] = (box[a] + size * (cell[a] + (d[a] > 0)) - o[a]) / d[a];
    }
  }

  // The whole ray; t_last is left where the traversal ended.
  MVDREAM_FAST_HD void run() {
    double enter[kMaxGrids], exit[kMaxGrids], crossings[2 * kMaxGrids];
    int n_crossings = 0;
    t_last = near;
    for (int g = 0; g < grids.n_grids; ++g) {
      if (!box_range(o, d, grids.aabbs + 6 * g, enter + g, exit + g)) {
        enter[g] = INFINITY;
        exit[g] = -INFINITY;
        continue;
      }
      for (const double t : {enter[g], exit[g]}) {
        int i = n_crossings++;
        for (; i > 0 && crossings[i - 1] > t; --i) crossings[i] = crossings[i - 1];
        crossings[i] = t;
      }
    }
    for (int i = 0; i + 1 < n_crossings && !full(); ++i) {
      const double from = fmax(crossings[i], near), to = fmin(crossings[i + 1], far), middle = 0.5 * (from + to);
      if (!(from < to)) continue;
      int level = 0;
      while (level < grids.n_grids && !(enter[level] <= middle && middle <= exit[level])) ++level;
      if (level == grids.n_grids) continue;
      if (!sink.open) skip_to(from);
      cells_between(level, from, to);
    }
  }
};

MVDREAM_FAST_HD GridStack grids_of(const TraverseArgs& args) {
  return {args.cells, args.aabbs, args.n_grids, {args.n[0], args.n[1], args.n[2]}};
}

// Whether every box is finite and has its minimum below its maximum.
MVDREAM_FAST_HD bool boxes_fine(const GridStack& grids) {
  for (int i = 0; i < grids.n_grids; ++i) {
    for (int a = 0; a < 3; ++a) {
      const float low = grids.aabbs[6 * i + a], high = grids.aabbs[6 * i + a + 3];
      if (!(low < high && 0.0f * low == 0.0f && 0.0f * high == 0.0f)) return false;
    }
  }
  return true;
}

// Whether a ray can be traversed, of boxes that are fine.
MVDREAM_FAST_HD MarchStatus status_of_traversal(const GridStack& grids, const float* o, const float* d, float near,
                                                float far, float step) {
  float finite = 0.0f * near, longest = 0;
  for (int a = 0; a < 3; ++a) {
    finite += 0.0f * o[a] + 0.0f * d[a];  // NaN if anything is infinite or NaN
    longest = fmaxf(longest, fabsf(d[a]));
  }
  if (!(finite == 0.0f)) return kMarchNotFinite;
  if (far != far) return kMarchFar;
  if (longest < kParallel) return kMarchNoDirection;
  if (!(step > 0)) return kMarchFine;
  double extent = 0;
  for (int i = 0; i < 3 * grids.n_grids; ++i) {
    const float* side = grids.aabbs + i / 3 * 6 + i % 3;
    extent = fmax(extent, static_cast<double>(side[3]) - side[0]);
  }
  const double way = fmin(extent / longest, static_cast<double>(far) - near);
  return way <= static_cast<double>(kMostSteps) * step ? kMarchFine : kMarchTooFine;
}

// Counts what ray `ray` meets or, where the arguments have room for it, writes it down; `fine` is of the boxes.
MVDREAM_FAST_HD MarchStatus traverse_ray(const TraverseArgs& args, const GridStack& grids, bool fine, int64_t ray) {
  const float *o = args.rays_o + 3 * ray, *d = args.rays_d + 3 * ray, near = args.near[ray], far = args.far[ray];
  const MarchStatus status = fine ? status_of_traversal(grids, o, d, near, far, args.step) : kMarchBox;
  const Traversal rules{args.step, args.cone, args.limit < 0 ? INT64_MAX : args.limit};
  TraversalSink sink;
  RayTraversal walk{grids, rules, o, d, near, far, near, sink};
  if (args.edges) {
    const int64_t edge = args.edge_starts[ray], sample = args.sample_starts[ray];
    sink.edges = args.edges + edge;
    sink.is_left = args.is_left + edge;
    sink.is_right = args.is_right + edge;
    sink.mids = args.mids + sample;
  }
  if (status == kMarchFine && (args.mask == nullptr || args.mask[ray])) walk.run();
  args.n_edges[ray] = sink.n_edges;
  args.n_samples[ray] = sink.n_samples;
  args.t_last[ray] = static_cast<float>(walk.t_last);
  return status;
}

}  // namespace MVDREAM_FAST_ISA
}  // namespace mvdream_fast
