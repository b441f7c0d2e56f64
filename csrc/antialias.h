// Where outlines cross the lines between neighbouring pixels, and what that means for their colours.
//
// An outline is an edge with one triangle, or with two that lie on the same side of it. It is followed over the screen,
// row by row, or where it is flatter than 45 degrees column by column. Between the two pixels' centres that it passes
// there, the one on the side of its triangles, the owner, shows a surface, and the other something farther than the
// edge. At distance d from the owner, in pixels, the owner takes max(0, 1/2 - d) of the other's colour, and the other
// max(0, d - 1/2) of the owner's: the area of a pixel that an edge at right angles to that line would cover. The
// triangles at the edge need not be seen: at the limb of anything round they are thinner than a pixel.
#pragma once

#include "rasterize.h"
#include "shape_types.h"

namespace mvdream_fast {
namespace MVDREAM_FAST_ISA {

// The line that a pair of pixels lies on.
struct PairLine {
  int axis;         // 0: neighbours in a row, 1: in a column
  int direction;    // from the owner to the other, 1 or -1
  double place[2];  // the owner's centre in pixels
  double half[2];   // half the width and height of the screen
};

// A corner's place along and across the line, in pixels from the owner's centre; w must be positive.
MVDREAM_FAST_HD void on_line(const Corner& p, const PairLine& line, double* along, double* across) {
  const double x = (p.x / p.w + 1) * line.half[0] - line.place[0], y = (p.y / p.w + 1) * line.half[1] - line.place[1];
  *along = line.axis == 0 ? x : y;
  *across = line.axis == 0 ? y : x;
}

// On which side of a line through two corners a third lies, also behind the camera: a triangle's points near the edge
// lie there, too.
MVDREAM_FAST_HD double side_of(const Corner& a, const Corner& b, const Corner& p) {
  return a.x * (b.y * p.w - b.w * p.y) - a.y * (b.x * p.w - b.w * p.x) + a.w * (b.x * p.y - b.y * p.x);
}

// Gradients of x, y and w of the edge's corners a and b from that of the distance.
MVDREAM_FAST_HD void crossing_gradients(const Corner& a, const Corner& b, const PairLine& line, double d_distance,
                                        double d_a[3], double d_b[3]) {
  double along_a, across_a, along_b, across_b;
  on_line(a, line, &along_a, &across_a);
  on_line(b, line, &along_b, &across_b);
  const double rise = across_b - across_a, x = (along_a * across_b - along_b * across_a) / rise;
  const double d = line.direction * d_distance / rise;
  const double d_of[2][2] = {{d * across_b, d * (x - along_b)}, {-d * across_a, d * (along_a - x)}};
  const Corner* corners[2] = {&a, &b};
  double* out[2] = {d_a, d_b};
  for (int k = 0; k < 2; ++k) {
    const double d_x = d_of[k][line.axis] * line.half[0] / corners[k]->w;
    const double d_y = d_of[k][1 - line.axis] * line.half[1] / corners[k]->w;
    out[k][0] = d_x;
    out[k][1] = d_y;
    out[k][2] = -(d_x * corners[k]->x + d_y * corners[k]->y) / corners[k]->w;
  }
}

// An image for crossings: rast [H, W, 4], pos [V, 4], tri and opposite [F, 3].
struct Outlines {
  const float *rast, *pos;
  const int32_t *tri, *opposite;
  int64_t n_vertices, n_faces;
  int height, width;
};

MVDREAM_FAST_HD Outlines outlines_of(const Silhouettes& args, int64_t image) {
  const int64_t n_pixels = int64_t(args.meshes.height) * args.meshes.width;
  return {args.rast + 4 * image * n_pixels,
          args.meshes.pos + 4 * image * args.meshes.n_vertices,
          args.meshes.tri,
          args.opposite,
          args.meshes.n_vertices,
          args.meshes.n_faces,
          args.meshes.height,
          args.meshes.width};
}

// The nearest crossing of a pair of pixels is the least key: 36 bits of depth above twice the number of the edge, three
// times the triangle's plus the corner's that it is opposite to, plus 1 where the first pixel is the owner. What is
// kept of a pair is that number plus 1, and 0 without a crossing.
constexpr int kEdgeBits = 27;

MVDREAM_FAST_HD uint64_t crossing_key(double depth, int64_t edge, bool first_owns) {
  const double steps = (depth + 1) * 34359738368.0, most = 68719476735.0;
  const uint64_t high = static_cast<uint64_t>(!(steps >= 0) ? 0 : steps > most ? most : steps);
  return high << kEdgeBits | static_cast<uint64_t>(2 * edge + (first_owns ? 1 : 0));
}

MVDREAM_FAST_HD int32_t kept_of(uint64_t key) {
  return static_cast<int32_t>(key & ((uint64_t(1) << kEdgeBits) - 1)) + 1;
}

// Whether the owner shows a surface, and the other something farther than a depth.
MVDREAM_FAST_HD bool passes_between(const float* own, const float* other, double depth) {
  return own[3] > 0 && own[3] != other[3] && (other[3] == 0 || other[2] > depth);
}

// The whole numbers from `at` on, in [0, n].
MVDREAM_FAST_HD int first_line(double at, int n) {
  const double line = ceil(at);
  return line >= n ? n : line > 0 ? static_cast<int>(line) : 0;  // 0 for NaN, too
}

// Calls visit(pair, key) where an outline from a to b passes between two pixels; pair: twice the first one's number,
// plus the axis. `left`: the side of its triangles, seen along it, y upwards.
template <typename Visit>
MVDREAM_FAST_HD void follow(const Outlines& image, const Corner& a, const Corner& b, bool left, int64_t edge,
                            Visit visit) {
  if (!(a.w > 0 && b.w > 0)) return;
  const double half[2] = {image.width * 0.5, image.height * 0.5};
  PairLine line = {0, 1, {0.5, 0.5}, {half[0], half[1]}};
  double x, y, end_x, end_y;
  on_line(a, line, &x, &y);
  on_line(b, line, &end_x, &end_y);
  const int axis = fabs(end_x - x) > fabs(end_y - y) ? 1 : 0;
  const double along = axis == 0 ? x : y, across = axis == 0 ? y : x;
  const double way = (axis == 0 ? end_x : end_y) - along, rise = (axis == 0 ? end_y : end_x) - across;
  if (!(rise != 0)) return;
  const int n_lines = axis == 0 ? image.height : image.width, last = (axis == 0 ? image.width : image.height) - 1;
  const bool first_owns = (axis == 0 ? rise > 0 : rise < 0) == left;
  const double depth = a.z / a.w, deeper = b.z / b.w - depth;
  const int end = first_line(most(across, across + rise), n_lines);
  for (int i = first_line(least(across, across + rise), n_lines); i < end; ++i) {
    const double share = (i - across) / rise, at = along + share * way, here = depth + share * deeper;
    if (!(at >= 0 && at < last)) continue;
    const int place = static_cast<int>(at);
    const int64_t first = axis == 0 ? int64_t(i) * image.width + place : int64_t(place) * image.width + i;
    const float *one = image.rast + 4 * first, *two = one + 4 * (axis == 0 ? 1 : image.width);
    if (!passes_between(first_owns ? one : two, first_owns ? two : one, here)) continue;
    visit(2 * first + axis, crossing_key(here, edge, first_owns));
  }
}

// Calls visit(pair, key) for the outlines among a triangle's edges. Raises `bad` for vertices that there are not.
template <typename Visit>
MVDREAM_FAST_HD void visit_outlines(const Outlines& image, int64_t face, int* bad, Visit visit) {
  const int32_t *v = image.tri + 3 * face, *opposite = image.opposite + 3 * face;
  Corner corners[3];
  for (int k = 0; k < 3; ++k) {
    if (v[k] < 0 || v[k] >= image.n_vertices || opposite[k] >= image.n_vertices) {
      *bad = 1;
      return;
    }
    corners[k] = corner_of(image.pos + 4 * int64_t(v[k]));
  }
  const double own = side_of(corners[0], corners[1], corners[2]);
  for (int k = 0; k < 3; ++k) {
    if (opposite[k] >= 0 && opposite[k] < v[k]) continue;  // the other triangle sees to it
    const Corner &a = corners[(k + 1) % 3], &b = corners[(k + 2) % 3];
    const double its = opposite[k] < 0 ? own : side_of(a, b, corner_of(image.pos + 4 * int64_t(opposite[k])));
    if (own * its >= 0 && own + its != 0) follow(image, a, b, own + its > 0, 3 * face + k, visit);
  }
}

// A pair of neighbours with a crossing: the ends of its edge and how far that is from the owner, in [0, 1];
// `first_takes`: whether the first pixel is the one whose colour changes, by `share` of the difference.
struct Crossing {
  int32_t a, b;
  PairLine line;
  bool owner_takes, first_takes;
  float share;
};

MVDREAM_FAST_HD Crossing crossing_of(const Outlines& image, int x, int y, int axis, int32_t kept) {
  const int32_t edge = (kept - 1) / 2, k = edge % 3, *v = image.tri + 3 * (edge / 3);
  const bool first_owns = (kept - 1) % 2 != 0;
  const int step = first_owns ? 0 : 1;
  Crossing found;
  found.a = v[(k + 1) % 3];
  found.b = v[(k + 2) % 3];
  found.line = {axis,
                first_owns ? 1 : -1,
                {x + 0.5 + (axis == 0 ? step : 0), y + 0.5 + (axis == 1 ? step : 0)},
                {image.width * 0.5, image.height * 0.5}};
  double along_a, across_a, along_b, across_b;
  on_line(corner_of(image.pos + 4 * int64_t(found.a)), found.line, &along_a, &across_a);
  on_line(corner_of(image.pos + 4 * int64_t(found.b)), found.line, &along_b, &across_b);
  const double d = found.line.direction * (along_a * across_b - along_b * across_a) / (across_b - across_a);
  const double share = 0.5 - clamped(d, 0, 1);
  found.owner_takes = share > 0;
  found.first_takes = found.owner_takes == first_owns;
  found.share = static_cast<float>(share > 0 ? share : -share);
  return found;
}

// Calls visit(the other pixel, how much this one takes of it, how much it takes of this one) for the pairs of a pixel
// with crossings [H, W, 2].
template <typename Visit>
MVDREAM_FAST_HD void visit_pairs(const Outlines& image, const int32_t* crossings, int x, int y, Visit visit) {
  const int64_t pixel = int64_t(y) * image.width + x;
  for (int axis = 0; axis < 2; ++axis) {
    const int64_t step = axis == 0 ? 1 : image.width;
    const int32_t after = crossings[2 * pixel + axis];
    if (after != 0) {
      const Crossing found = crossing_of(image, x, y, axis, after);
      visit(pixel + step, found.first_takes ? found.share : 0.0f, found.first_takes ? 0.0f : found.share);
    }
    const int32_t before = (axis == 0 ? x : y) > 0 ? crossings[2 * (pixel - step) + axis] : 0;
    if (before != 0) {
      const Crossing found = crossing_of(image, x - (axis == 0), y - (axis == 1), axis, before);
      visit(pixel - step, found.first_takes ? 0.0f : found.share, found.first_takes ? found.share : 0.0f);
    }
  }
}

// Calls add(corner, gradients of its x, y and w) for the two corners of the edge between a pair of pixels.
template <typename Add>
MVDREAM_FAST_HD void pair_gradients(const Outlines& image, const float* color, const float* d_out, int n_channels,
                                    int x, int y, int axis, int32_t kept, Add add) {
  const Crossing found = crossing_of(image, x, y, axis, kept);
  const int64_t first = int64_t(y) * image.width + x, second = first + (axis == 0 ? 1 : image.width);
  const float* taker = color + (found.first_takes ? first : second) * n_channels;
  const float* giver = color + (found.first_takes ? second : first) * n_channels;
  const float* d_taker = d_out + (found.first_takes ? first : second) * n_channels;
  double d_share = 0;
  for (int c = 0; c < n_channels; ++c) d_share += double(d_taker[c]) * (double(giver[c]) - taker[c]);
  if (d_share == 0) return;
  double d_a[3], d_b[3];
  crossing_gradients(corner_of(image.pos + 4 * int64_t(found.a)), corner_of(image.pos + 4 * int64_t(found.b)),
                     found.line, found.owner_takes ? -d_share : d_share, d_a, d_b);
  add(found.a, d_a);
  add(found.b, d_b);
}

}  // namespace MVDREAM_FAST_ISA
}  // namespace mvdream_fast
