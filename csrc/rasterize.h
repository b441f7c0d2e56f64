// Triangles to pixels: snapping, clipping, the fill rule, and what a pixel knows of its triangle, with the way back.
//
// Pixel (i, j) has its centre at x = (i + 0.5) 2 / W - 1, y = (j + 0.5) 2 / H - 1 of the clip space after division: row
// 0 is the bottom. Vertices are snapped to 1/4096 of a pixel; from there on, which pixels a triangle covers is decided
// by integers, so that neighbours that share an edge never share a pixel and leave none out.
#pragma once

#include <cmath>

#include "hd.h"

namespace mvdream_fast {
namespace MVDREAM_FAST_ISA {

constexpr int kSubpixelBits = 12;
constexpr int64_t kSubpixels = 1 << kSubpixelBits;
constexpr double kGuard = 1 << 15;  // pixels from the middle of the screen; what lies farther out is clipped there
constexpr int kClipPlanes = 7, kMostCorners = 3 + kClipPlanes;
constexpr int64_t kMostFaces = 1 << 24;  // the id of a triangle is a float
constexpr double kLeastW = 1e-30;

// A vertex on the screen, in 1/4096 of a pixel from the centre of pixel (0, 0), and its depth z/w.
struct Snapped {
  int32_t x, y;
  double depth;
};

struct Corner {
  double x, y, z, w;  // clip space
};

struct Viewport {
  int width, height;
};

MVDREAM_FAST_HD Corner corner_of(const float* pos) { return {pos[0], pos[1], pos[2], pos[3]}; }

MVDREAM_FAST_HD bool is_finite(const Corner& p) {
  const double sum = p.x * 0 + p.y * 0 + p.z * 0 + p.w * 0;  // NaN where any is infinite or NaN
  return sum == 0;
}

// How far a corner lies inside of a plane of the clipped volume, not negative where it does.
MVDREAM_FAST_HD double inside_plane(const Corner& p, int plane, const Viewport& screen) {
  if (plane == 0) return p.w - kLeastW;
  if (plane <= 2) return plane == 1 ? p.w + p.z : p.w - p.z;
  const double guard = 2 * kGuard / (plane <= 4 ? screen.width : screen.height) * p.w;
  const double along = plane <= 4 ? p.x : p.y;
  return plane % 2 ? guard + along : guard - along;
}

MVDREAM_FAST_HD bool needs_no_clipping(const Corner& p, const Viewport& screen) {
  for (int plane = 0; plane < kClipPlanes; ++plane) {
    if (!(inside_plane(p, plane, screen) >= 0)) return false;
  }
  return true;
}

MVDREAM_FAST_HD int32_t snapped(double ndc, int pixels) {
  const double most = 1 << 29;  // which the guard band keeps all but what no rounding leaves below
  const double at = floor((ndc * 0.5 + 0.5) * pixels * kSubpixels + 0.5) - kSubpixels / 2;
  return static_cast<int32_t>(at < -most ? -most : at < most ? at : most);
}

// Of a corner that needs no clipping.
MVDREAM_FAST_HD Snapped snap(const Corner& p, const Viewport& screen) {
  return {snapped(p.x / p.w, screen.width), snapped(p.y / p.w, screen.height), p.z / p.w};
}

// Cuts a polygon of n corners at one plane; from its inside to its outside, so that both triangles at an edge make the
// same corner. Returns the number of corners in `out`.
MVDREAM_FAST_HD int cut(const Corner* polygon, int n, int plane, const Viewport& screen, Corner* out) {
  int count = 0;
  for (int i = 0; i < n; ++i) {
    const Corner a = polygon[i], b = polygon[i + 1 < n ? i + 1 : 0];
    const double in_a = inside_plane(a, plane, screen), in_b = inside_plane(b, plane, screen);
    if (in_a >= 0) out[count++] = a;
    if ((in_a >= 0) == (in_b >= 0)) continue;
    const Corner p = in_a >= 0 ? a : b, q = in_a >= 0 ? b : a;
    const double in_p = in_a >= 0 ? in_a : in_b, in_q = in_a >= 0 ? in_b : in_a, t = in_p / (in_p - in_q);
    out[count++] = {p.x + t * (q.x - p.x), p.y + t * (q.y - p.y), p.z + t * (q.z - p.z), p.w + t * (q.w - p.w)};
  }
  return count;
}

// The visible part of a triangle as a polygon on the screen; returns its number of corners, below 3 where there is
// none.
MVDREAM_FAST_HD int clip(const Corner* triangle, const Viewport& screen, Snapped* out) {
  Corner buffers[2][kMostCorners];
  int n = 3;
  for (int i = 0; i < 3; ++i) buffers[0][i] = triangle[i];
  for (int plane = 0; plane < kClipPlanes && n >= 3; ++plane) {
    n = cut(buffers[plane % 2], n, plane, screen, buffers[1 - plane % 2]);
  }
  const Corner* polygon = buffers[kClipPlanes % 2];
  for (int i = 0; i < n && n >= 3; ++i) {
    Corner p = polygon[i];
    if (!(p.w >= kLeastW)) p.w = kLeastW;
    // Rounding may leave a corner a hair outside of the guard band.
    out[i] = snap(p, screen);
  }
  return n;
}

struct Box {
  int x0, x1, y0, y1;  // pixels, both ends inclusive; empty where an end lies before its start
};

MVDREAM_FAST_HD int first_centre(int32_t at) {
  return static_cast<int>((int64_t(at) + kSubpixels - 1) >> kSubpixelBits);
}
MVDREAM_FAST_HD int last_centre(int32_t at) { return static_cast<int>(at >> kSubpixelBits); }

template <typename T>
MVDREAM_FAST_HD T least(T a, T b) {
  return a < b ? a : b;
}
template <typename T>
MVDREAM_FAST_HD T most(T a, T b) {
  return a > b ? a : b;
}

// The pixels whose centres a triangle may cover.
MVDREAM_FAST_HD Box box_of(const Snapped& a, const Snapped& b, const Snapped& c, const Viewport& screen) {
  Box box;
  box.x0 = most(first_centre(least(least(a.x, b.x), c.x)), 0);
  box.x1 = least(last_centre(most(most(a.x, b.x), c.x)), screen.width - 1);
  box.y0 = most(first_centre(least(least(a.y, b.y), c.y)), 0);
  box.y1 = least(last_centre(most(most(a.y, b.y), c.y)), screen.height - 1);
  return box;
}

// Twice the area in squares of 1/4096 of a pixel, positive counter-clockwise (y upwards).
MVDREAM_FAST_HD int64_t area_of(const Snapped& a, const Snapped& b, const Snapped& c) {
  return (int64_t(b.x) - a.x) * (int64_t(c.y) - a.y) - (int64_t(b.y) - a.y) * (int64_t(c.x) - a.x);
}

// The edge functions of a triangle at the pixel centres, in whole numbers: pixel (i, j) is covered where all three of
// at[k] + step_x[k] (i - x0) + step_y[k] (j - y0) are not negative. Depth is a plane through the three corners.
struct Edges {
  double at[3], step_x[3], step_y[3];
  double depth, depth_x, depth_y, origin_x, origin_y;
};

// E = (b - a) x (p - a); a centre on an edge belongs to the triangle of which that is a left or top edge, in a
// counter-clockwise triangle one that runs downwards or, level, to the left. Centres are whole multiples of 4096, so
// E may be divided by that, rounded down, without a change of any sign. All below 2^53: exact as doubles.
MVDREAM_FAST_HD void set_edge(const Snapped& a, const Snapped& b, int x0, int y0, int k, Edges* edges) {
  const int64_t dx = int64_t(b.x) - a.x, dy = int64_t(b.y) - a.y;
  const int64_t e = dx * ((int64_t(y0) << kSubpixelBits) - a.y) - dy * ((int64_t(x0) << kSubpixelBits) - a.x);
  const bool inclusive = dy < 0 || (dy == 0 && dx < 0);
  edges->at[k] = static_cast<double>((e - (inclusive ? 0 : 1)) >> kSubpixelBits);
  edges->step_x[k] = static_cast<double>(-dy);
  edges->step_y[k] = static_cast<double>(dx);
}

// Relative to pixel (x0, y0); false for a triangle without area.
MVDREAM_FAST_HD bool set_edges(const Snapped& a, const Snapped& b, const Snapped& c, int x0, int y0, Edges* edges) {
  const int64_t area = area_of(a, b, c);
  if (area == 0) return false;
  const Snapped &second = area > 0 ? b : c, &third = area > 0 ? c : b;
  set_edge(a, second, x0, y0, 0, edges);
  set_edge(second, third, x0, y0, 1, edges);
  set_edge(third, a, x0, y0, 2, edges);
  const double scale = double(kSubpixels) / double(area), db = b.depth - a.depth, dc = c.depth - a.depth;
  edges->depth = a.depth;
  edges->depth_x = (db * (double(c.y) - a.y) - dc * (double(b.y) - a.y)) * scale;
  edges->depth_y = (dc * (double(b.x) - a.x) - db * (double(c.x) - a.x)) * scale;
  edges->origin_x = double(a.x) / kSubpixels;
  edges->origin_y = double(a.y) / kSubpixels;
  return true;
}

// Depths are compared in steps of 2^-39, so that surfaces that coincide do not fight; of equal ones the first face
// wins.
constexpr double kDepthRounding = 12288;  // 1.5 * 2^13: a sum with it has a last digit of 2^-39

// The clip-space corners of a pixel's triangle, the pixel's place, and what follows; R is a double or a vector of them.
template <typename R>
struct PixelTriangle {
  R x[3], y[3], z[3], w[3];  // x and y: less the pixel's place times w
  R area[3];                 // of the triangles that the pixel makes with two corners: barycentric weights times `sum`
  R slope_x[3], slope_y[3];  // d area / d place
  R sum, inverse;

  // x, y: of the corners as they are.
  MVDREAM_FAST_HD void set(R place_x, R place_y) {
    for (int i = 0; i < 3; ++i) {
      x[i] = x[i] - place_x * w[i];
      y[i] = y[i] - place_y * w[i];
    }
    for (int i = 0; i < 3; ++i) {
      const int j = (i + 1) % 3, k = (i + 2) % 3;
      area[i] = x[j] * y[k] - y[j] * x[k];
      slope_x[i] = w[k] * y[j] - w[j] * y[k];
      slope_y[i] = w[j] * x[k] - w[k] * x[j];
    }
    sum = area[0] + area[1] + area[2];
    inverse = inverse_of(sum);
  }
  static MVDREAM_FAST_HD R inverse_of(R x) {
    const R one = x * 0.0 + 1.0;
    return x == 0.0 ? x * 0.0 : one / (x == 0.0 ? one : x);
  }
};

template <typename R>
struct PixelOutputs {
  R u, v, depth, db[4];  // db: du/dX, du/dY, dv/dX, dv/dY, X and Y in pixels
};

template <typename R>
MVDREAM_FAST_HD R clamped(R x, double low, double high) {
  const R below = x * 0.0 + low, above = x * 0.0 + high;
  return x < low ? below : x > high ? above : x;
}

// scale_x, scale_y: clip-space units a pixel, 2 / W and 2 / H.
template <typename R>
MVDREAM_FAST_HD PixelOutputs<R> outputs_of(const PixelTriangle<R>& t, double scale_x, double scale_y) {
  PixelOutputs<R> out;
  const R u = t.area[0] * t.inverse, v = t.area[1] * t.inverse;
  const R w = t.area[0] * t.w[0] + t.area[1] * t.w[1] + t.area[2] * t.w[2];
  const R z = t.area[0] * t.z[0] + t.area[1] * t.z[1] + t.area[2] * t.z[2];
  const R slope_x = t.slope_x[0] + t.slope_x[1] + t.slope_x[2], slope_y = t.slope_y[0] + t.slope_y[1] + t.slope_y[2];
  out.depth = clamped(z * PixelTriangle<R>::inverse_of(w), -1, 1);
  out.db[0] = (t.slope_x[0] - u * slope_x) * (t.inverse * scale_x);
  out.db[1] = (t.slope_y[0] - u * slope_y) * (t.inverse * scale_y);
  out.db[2] = (t.slope_x[1] - v * slope_x) * (t.inverse * scale_x);
  out.db[3] = (t.slope_y[1] - v * slope_y) * (t.inverse * scale_y);
  // A centre that snapping has put inside may lie a hair outside.
  out.u = clamped(u, 0, 1);
  out.v = clamped(v, 0, 1);
  const R total = out.u + out.v, over = total > 1.0 ? total : total * 0.0 + 1.0;
  out.u = out.u / over;
  out.v = out.v / over;
  return out;
}

// Gradients of the corners' x, y and w from those of u, v and db, as if nothing had been clamped; z has none.
template <typename R>
MVDREAM_FAST_HD void corner_gradients(const PixelTriangle<R>& t, R place_x, R place_y, double scale_x, double scale_y,
                                      const R d_uv[2], const R d_db[4], R d[3][3]) {
  const R u = t.area[0] * t.inverse, v = t.area[1] * t.inverse;
  const R slope_x = t.slope_x[0] + t.slope_x[1] + t.slope_x[2], slope_y = t.slope_y[0] + t.slope_y[1] + t.slope_y[2];
  const R ux = d_db[0] * (scale_x * t.inverse), uy = d_db[1] * (scale_y * t.inverse);
  const R vx = d_db[2] * (scale_x * t.inverse), vy = d_db[3] * (scale_y * t.inverse);
  const R d_u = (d_uv[0] - ux * slope_x - uy * slope_y) * t.inverse;
  const R d_v = (d_uv[1] - vx * slope_x - vy * slope_y) * t.inverse;
  const R d_sum = -(d_u * u + d_v * v) - (ux * (t.slope_x[0] - u * slope_x) + uy * (t.slope_y[0] - u * slope_y) +
                                          vx * (t.slope_x[1] - v * slope_x) + vy * (t.slope_y[1] - v * slope_y)) *
                                             t.inverse;
  const R sum_x = -(ux * u + vx * v), sum_y = -(uy * u + vy * v);
  const R d_area[3] = {d_u + d_sum, d_v + d_sum, d_sum};
  const R d_slope_x[3] = {ux + sum_x, vx + sum_x, sum_x}, d_slope_y[3] = {uy + sum_y, vy + sum_y, sum_y};
  for (int i = 0; i < 3; ++i) d[i][0] = d[i][1] = d[i][2] = u * 0.0;
  for (int i = 0; i < 3; ++i) {
    const int j = (i + 1) % 3, k = (i + 2) % 3;
    d[j][0] = d[j][0] + d_area[i] * t.y[k] - d_slope_y[i] * t.w[k];
    d[j][1] = d[j][1] - d_area[i] * t.x[k] + d_slope_x[i] * t.w[k];
    d[j][2] = d[j][2] - d_slope_x[i] * t.y[k] + d_slope_y[i] * t.x[k];
    d[k][0] = d[k][0] - d_area[i] * t.y[j] + d_slope_y[i] * t.w[j];
    d[k][1] = d[k][1] + d_area[i] * t.x[j] - d_slope_x[i] * t.w[j];
    d[k][2] = d[k][2] + d_slope_x[i] * t.y[j] - d_slope_y[i] * t.x[j];
  }
  for (int i = 0; i < 3; ++i) d[i][2] = d[i][2] - place_x * d[i][0] - place_y * d[i][1];
}

// The corners of a pixel's triangle, by the id in its last channel (triangle + 1, 0 for none). False for background and
// for whatever is no triangle of the mesh or has no vertex there, in which case `bad` is raised.
MVDREAM_FAST_HD bool corners_of(float id, const int32_t* tri, int64_t n_faces, int64_t n_vertices, int32_t* corners,
                                int* bad) {
  if (id == 0) return false;
  if (!(id >= 1 && id <= static_cast<float>(n_faces))) {
    *bad = 1;
    return false;
  }
  const int32_t* face = tri + 3 * (static_cast<int64_t>(id) - 1);
  for (int k = 0; k < 3; ++k) {
    if (face[k] < 0 || face[k] >= n_vertices) {
      *bad = 1;
      return false;
    }
    corners[k] = face[k];
  }
  return true;
}

}  // namespace MVDREAM_FAST_ISA
}  // namespace mvdream_fast
