// Where a silhouette crosses the line between two neighbouring pixels, and what that means for their colours.
//
// A pair of neighbours that show different triangles belongs to the nearer one, the owner. Where the line from the
// owner's centre to the other's leaves the triangle through a silhouette edge at distance d, in pixels, the owner takes
// max(0, 1/2 - d) of the other's colour, and the other max(0, d - 1/2) of the owner's: the area of a pixel that an edge
// at right angles to that line would cover.
#pragma once

#include "rasterize.h"
#include "shape_types.h"

namespace mvdream_fast {
namespace MVDREAM_FAST_ISA {

constexpr double kCrossingSlack = 1.0 / 256;  // coverage is decided on snapped vertices, crossings on exact ones

struct Crossing {
  int edge = -1;        // the triangle's corner that the edge is opposite to; -1: no silhouette crosses
  double distance = 0;  // from the owner's centre, in [0, 1]
};

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

// `beyond`: the corner across each edge; `has`: whether there is one.
MVDREAM_FAST_HD Crossing crossing_of(const Corner* corners, const Corner* beyond, const bool* has,
                                     const PairLine& line) {
  Crossing crossing;
  double along[3], across[3], farthest = -1e300;
  for (int k = 0; k < 3; ++k) {
    if (corners[k].w > 0) on_line(corners[k], line, &along[k], &across[k]);
  }
  for (int k = 0; k < 3; ++k) {
    const int a = (k + 1) % 3, b = (k + 2) % 3;
    if (!(corners[a].w > 0 && corners[b].w > 0) || (across[a] < 0) == (across[b] < 0)) continue;
    const double d = line.direction * (along[a] * across[b] - along[b] * across[a]) / (across[b] - across[a]);
    if (!(d > farthest)) continue;
    farthest = d;
    crossing.edge = k;
  }
  if (crossing.edge < 0) return crossing;
  const int k = crossing.edge, a = (k + 1) % 3, b = (k + 2) % 3;
  const bool within = farthest >= -kCrossingSlack && farthest <= 1 + kCrossingSlack;
  const bool steep = std::fabs(across[b] - across[a]) >= std::fabs(along[b] - along[a]);
  const bool outline =
      !has[k] || side_of(corners[a], corners[b], corners[k]) * side_of(corners[a], corners[b], beyond[k]) >= 0;
  crossing.distance = clamped(farthest, 0, 1);
  if (!(within && steep && outline)) crossing.edge = -1;
  return crossing;
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

// A crossing as one number of a pair: 0 for none, 1 + distance where the first pixel is the owner, less that for the
// second. `first_takes`: whether the first pixel is the one whose colour changes, by `share` of the difference.
struct Share {
  bool first_takes;
  float share;
};

MVDREAM_FAST_HD Share share_of(float crossing) {
  const float distance = (crossing > 0 ? crossing : -crossing) - 1, share = 0.5f - distance;
  return {(share > 0) == (crossing > 0), share > 0 ? share : -share};
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

// A pair of neighbours: the first pixel, and the axis along which the second comes after it.
struct Found {
  Crossing crossing;
  PairLine line;
  int32_t corners[3];
  bool first_owns;
};

// Looks for a crossing between two pixels that show different triangles.
MVDREAM_FAST_HD Found find_crossing(const Outlines& image, int x, int y, int axis, int* bad) {
  Found found;
  const float* first = image.rast + 4 * (int64_t(y) * image.width + x);
  const float* second = first + 4 * (axis == 0 ? 1 : image.width);
  found.first_owns = second[3] == 0 || (first[3] != 0 && first[2] < second[2]);
  const float id = (found.first_owns ? first : second)[3];
  if (!corners_of(id, image.tri, image.n_faces, image.n_vertices, found.corners, bad)) return found;
  Corner corners[3], beyond[3];
  bool has[3];
  for (int k = 0; k < 3; ++k) {
    const int32_t across = image.opposite[3 * (static_cast<int64_t>(id) - 1) + k];
    if (across >= image.n_vertices) *bad = 1;
    has[k] = across >= 0 && across < image.n_vertices;
    corners[k] = corner_of(image.pos + 4 * int64_t(found.corners[k]));
    beyond[k] = has[k] ? corner_of(image.pos + 4 * int64_t(across)) : corners[k];
  }
  const int step = found.first_owns ? 0 : 1;
  found.line = {axis,
                found.first_owns ? 1 : -1,
                {x + 0.5 + (axis == 0 ? step : 0), y + 0.5 + (axis == 1 ? step : 0)},
                {image.width * 0.5, image.height * 0.5}};
  found.crossing = crossing_of(corners, beyond, has, found.line);
  return found;
}

MVDREAM_FAST_HD bool differs(const Outlines& image, int x, int y, int axis) {
  if (axis == 0 ? x + 1 >= image.width : y + 1 >= image.height) return false;
  const float* first = image.rast + 4 * (int64_t(y) * image.width + x);
  return first[3] != first[4 * (axis == 0 ? 1 : image.width) + 3];
}

// The number of a pair (see Share).
MVDREAM_FAST_HD float crossing_number(const Outlines& image, int x, int y, int axis, int* bad) {
  if (!differs(image, x, y, axis)) return 0;
  const Found found = find_crossing(image, x, y, axis, bad);
  if (found.crossing.edge < 0) return 0;
  const float number = static_cast<float>(1 + found.crossing.distance);
  return found.first_owns ? number : -number;
}

// Calls visit(the other pixel, how much this one takes of it, how much it takes of this one) for the pairs of a pixel
// with crossings [H, W, 2].
template <typename Visit>
MVDREAM_FAST_HD void visit_pairs(const float* crossings, int x, int y, int width, int height, Visit visit) {
  const int64_t pixel = int64_t(y) * width + x;
  for (int axis = 0; axis < 2; ++axis) {
    const int64_t step = axis == 0 ? 1 : width;
    if ((axis == 0 ? x + 1 < width : y + 1 < height) && crossings[2 * pixel + axis] != 0) {
      const Share share = share_of(crossings[2 * pixel + axis]);
      visit(pixel + step, share.first_takes ? share.share : 0.0f, share.first_takes ? 0.0f : share.share);
    }
    if ((axis == 0 ? x : y) > 0 && crossings[2 * (pixel - step) + axis] != 0) {
      const Share share = share_of(crossings[2 * (pixel - step) + axis]);
      visit(pixel - step, share.first_takes ? 0.0f : share.share, share.first_takes ? share.share : 0.0f);
    }
  }
}

// Calls add(corner, gradients of its x, y and w) for the two corners of the edge between a pair of pixels.
template <typename Add>
MVDREAM_FAST_HD void pair_gradients(const Outlines& image, const float* color, const float* d_out, int n_channels,
                                    int x, int y, int axis, float crossing, Add add) {
  int bad = 0;
  const Share share = share_of(crossing);
  const int64_t first = int64_t(y) * image.width + x, second = first + (axis == 0 ? 1 : image.width);
  const float* taker = color + (share.first_takes ? first : second) * n_channels;
  const float* giver = color + (share.first_takes ? second : first) * n_channels;
  const float* d_taker = d_out + (share.first_takes ? first : second) * n_channels;
  double d_share = 0;
  for (int c = 0; c < n_channels; ++c) d_share += double(d_taker[c]) * (double(giver[c]) - taker[c]);
  if (d_share == 0) return;
  const Found found = find_crossing(image, x, y, axis, &bad);
  if (found.crossing.edge < 0) return;
  const double d_distance = found.first_owns == share.first_takes ? -d_share : d_share;
  const int32_t a = found.corners[(found.crossing.edge + 1) % 3], b = found.corners[(found.crossing.edge + 2) % 3];
  double d_a[3], d_b[3];
  crossing_gradients(corner_of(image.pos + 4 * int64_t(a)), corner_of(image.pos + 4 * int64_t(b)), found.line,
                     d_distance, d_a, d_b);
  add(a, d_a);
  add(b, d_b);
}

}  // namespace MVDREAM_FAST_ISA
}  // namespace mvdream_fast
