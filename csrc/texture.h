// Which texels make a pixel's colour, with what weights, and how those change with the coordinates and the level.
//
// Texel (i, j) of a level of w x h covers [i / w, (i + 1) / w] x [j / h, (j + 1) / h]. The level of detail is log2 of
// the longer axis, in texels of the largest level, of the ellipse that a pixel's circle is on the texture.
#pragma once

#include <cmath>
#include <cstdint>

#include "hd.h"
#include "shape_types.h"

namespace mvdream_fast {

enum TextureFilter { kNearest = 0, kLinear = 1, kMipmap = 2 };
enum TextureBoundary { kWrap = 0, kClamp = 1, kZero = 2 };

namespace MVDREAM_FAST_ISA {

constexpr int kMostTaps = 8;

// A texel of a pixel: its weight, and the slopes of that along u, v and the level.
struct Tap {
  int64_t texel;
  double weight, along_u, along_v, along_level;
};

struct TextureLevel {
  int width, height;
  int64_t start;  // its first texel
};

MVDREAM_FAST_HD TextureLevel texture_level(int width, int height, int level) {
  TextureLevel found = {width, height, 0};
  for (int i = 0; i < level; ++i) {
    found.start += int64_t(found.width) * found.height;
    found.width = found.width > 1 ? found.width / 2 : 1;
    found.height = found.height > 1 ? found.height / 2 : 1;
  }
  return found;
}

// The two texels along one axis, -1 for one that there is not, the second one's weight, and d weight / d coordinate.
struct Span {
  int64_t at[2];
  double high, slope;
};

MVDREAM_FAST_HD Span span_of(double coordinate, int n, int filter, int boundary) {
  if (boundary == kWrap) coordinate -= floor(coordinate);
  const double limit = 1 << 30;
  double x = coordinate * n - (filter == kNearest ? 0.0 : 0.5);
  x = x < -limit ? -limit : x > limit ? limit : x;
  Span span = {{0, 0}, 0, 0};
  if (filter != kNearest) {
    span.slope = n;
    if (boundary == kClamp && !(x > 0 && x < n - 1)) {
      x = x > 0 ? n - 1 : 0;
      span.slope = 0;
    }
    span.high = x - floor(x);
  }
  for (int k = 0; k < 2; ++k) {
    int64_t at = static_cast<int64_t>(floor(x)) + k;
    if (boundary == kWrap) at = at < 0 ? at + n : at >= n ? at - n : at;
    if (boundary == kClamp) at = at < 0 ? 0 : at >= n ? n - 1 : at;
    span.at[k] = at >= 0 && at < n ? at : -1;
  }
  return span;
}

// Of one level, weighted by `share`, whose slope along the level is `rise`; returns the number of taps.
MVDREAM_FAST_HD int level_taps(const TextureLevel& level, double u, double v, int filter, int boundary, double share,
                               double rise, Tap* taps) {
  const Span x = span_of(u, level.width, filter, boundary), y = span_of(v, level.height, filter, boundary);
  int n = 0;
  for (int k = 0; k < (filter == kNearest ? 1 : 4); ++k) {
    const int i = k % 2, j = k / 2;
    if (x.at[i] < 0 || y.at[j] < 0) continue;
    const double of_x = i ? x.high : 1 - x.high, of_y = j ? y.high : 1 - y.high;
    taps[n++] = {level.start + y.at[j] * level.width + x.at[i], share * of_x * of_y,
                 share * (i ? x.slope : -x.slope) * of_y, share * of_x * (j ? y.slope : -y.slope), rise * of_x * of_y};
  }
  return n;
}

// The level of detail of da = (du/dX, du/dY, dv/dX, dv/dY), and where `slopes` is given its derivatives by them, 0
// where it is cut off at the first or last level.
MVDREAM_FAST_HD double detail_level(const float* da, int width, int height, int n_levels, double* slopes) {
  const double ux = double(da[0]) * width, uy = double(da[1]) * width;
  const double vx = double(da[2]) * height, vy = double(da[3]) * height;
  const double xx = ux * ux + vx * vx, yy = uy * uy + vy * vy, xy = ux * uy + vx * vy;
  const double spread = std::sqrt(0.25 * (xx - yy) * (xx - yy) + xy * xy), longest = 0.5 * (xx + yy) + spread;
  for (int k = 0; k < 4 && slopes; ++k) slopes[k] = 0;
  const double level = longest > 0 ? 0.5 * std::log2(longest) : 0.0;
  if (!(level > 0)) return 0;
  if (level >= n_levels - 1) return n_levels - 1;
  if (slopes == nullptr) return level;
  const double scale = 0.5 / (0.6931471805599453 * longest), bend = spread > 0 ? 1 / spread : 0;
  const double d_xx = scale * (0.5 + 0.25 * (xx - yy) * bend), d_yy = scale * (0.5 - 0.25 * (xx - yy) * bend);
  const double d_xy = scale * xy * bend;
  slopes[0] = (2 * d_xx * ux + d_xy * uy) * width;
  slopes[1] = (2 * d_yy * uy + d_xy * ux) * width;
  slopes[2] = (2 * d_xx * vx + d_xy * vy) * height;
  slopes[3] = (2 * d_yy * vy + d_xy * vx) * height;
  return level;
}

// All taps of a pixel, none of coordinates that are no numbers; `slopes` as in detail_level, for the mip-mapped filter.
MVDREAM_FAST_HD int taps_of(const float* uv, const float* da, int width, int height, int n_levels, int filter,
                            int boundary, Tap* taps, double* slopes) {
  const double u = uv[0], v = uv[1];
  if (!(u - u == 0 && v - v == 0)) return 0;
  if (filter != kMipmap) return level_taps({width, height, 0}, u, v, filter, boundary, 1, 0, taps);
  const double level = detail_level(da, width, height, n_levels, slopes);
  const int first = static_cast<int>(level), second = first + 1 < n_levels ? first + 1 : first;
  const double between = level - first;
  const int n = level_taps(texture_level(width, height, first), u, v, filter, boundary, 1 - between, -1, taps);
  if (second == first) return n;
  return n + level_taps(texture_level(width, height, second), u, v, filter, boundary, between, 1, taps + n);
}

// Of a pixel counted through all images.
MVDREAM_FAST_HD int pixel_taps(const Textured& args, int64_t pixel, Tap* taps, double* slopes) {
  const float* da = args.uv_da ? args.uv_da + 4 * pixel : nullptr;
  return taps_of(args.uv + 2 * pixel, da, args.width, args.height, args.n_levels, args.filter, args.boundary, taps,
                 slopes);
}

// Gradients of a pixel's coordinates and footprint, either may be null; tex: of its image.
MVDREAM_FAST_HD void tap_gradients(const Textured& args, const float* tex, const Tap* taps, int n, const double* slopes,
                                   const float* d_out, float* d_uv, float* d_da) {
  double d_u = 0, d_v = 0, d_level = 0;
  for (int k = 0; k < n; ++k) {
    double d = 0;
    for (int c = 0; c < args.n_channels; ++c) d += double(d_out[c]) * tex[taps[k].texel * args.n_channels + c];
    d_u += d * taps[k].along_u;
    d_v += d * taps[k].along_v;
    d_level += d * taps[k].along_level;
  }
  if (d_uv) {
    d_uv[0] = float(d_u);
    d_uv[1] = float(d_v);
  }
  for (int k = 0; k < 4 && d_da; ++k) d_da[k] = float(d_level * slopes[k]);
}

}  // namespace MVDREAM_FAST_ISA
}  // namespace mvdream_fast
