// Traversal of several nested occupancy grids as nerfacc's users know it: steps that may grow with the distance, or one
// interval per cell; edges and samples of the intervals found. The plain case, one grid and a fixed step, is march.h's.
//
// Between two crossings of boxes a ray is in one grid: the first in the list that holds it. Inside, cell by cell, the
// ray steps until its next midpoint is past the cell; in an occupied cell every step is a sample.
#pragma once

#include <cmath>

#include "hd.h"

namespace mvdream_fast {
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

}  // namespace MVDREAM_FAST_ISA
}  // namespace mvdream_fast
