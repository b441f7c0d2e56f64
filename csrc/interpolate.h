// Vertex attributes at one pixel, and what a pixel's cotangents mean for its triangle's corners and its weights.
#pragma once

#include "rasterize.h"
#include "shape_types.h"

namespace mvdream_fast {
namespace MVDREAM_FAST_ISA {

MVDREAM_FAST_HD bool corners_at(const Attributes& args, int64_t pixel, int32_t* corners, int* bad) {
  return corners_of(args.rast[4 * pixel + 3], args.tri, args.n_faces, args.n_vertices, corners, bad);
}

// The attributes at a triangle's corners; a pixel has c + u (a - c) + v (b - c).
struct Rows {
  const float *a, *b, *c;
  MVDREAM_FAST_HD Rows(const Attributes& args, int64_t image, const int32_t* corners) {
    const float* attr = args.attr + image * args.stride;
    a = attr + int64_t(corners[0]) * args.n_attr;
    b = attr + int64_t(corners[1]) * args.n_attr;
    c = attr + int64_t(corners[2]) * args.n_attr;
  }
};

MVDREAM_FAST_HD void blend(const Attributes& args, const Rows& rows, int64_t pixel, float* out, float* out_da) {
  const float u = args.rast[4 * pixel], v = args.rast[4 * pixel + 1];
  for (int c = 0; c < args.n_attr; ++c) {
    out[c] = rows.c[c] + u * (rows.a[c] - rows.c[c]) + v * (rows.b[c] - rows.c[c]);
  }
  const float* db = args.rast_db + 4 * pixel;
  for (int i = 0; i < args.n_diff; ++i) {
    const int c = args.diff_attrs[i];
    const float along_u = rows.a[c] - rows.c[c], along_v = rows.b[c] - rows.c[c];
    out_da[2 * i] = db[0] * along_u + db[2] * along_v;
    out_da[2 * i + 1] = db[1] * along_u + db[3] * along_v;
  }
}

// Cotangents of a pixel's outputs, null where nothing flows.
struct Given {
  const float *d_out, *d_out_da;
};

MVDREAM_FAST_HD void coordinate_gradients(const Attributes& args, const Rows& rows, const Given& given, float* d_rast,
                                          float* d_db) {
  double d_uv[4] = {}, d_slopes[4] = {};
  for (int c = 0; c < args.n_attr && given.d_out != nullptr; ++c) {
    d_uv[0] += double(given.d_out[c]) * (rows.a[c] - rows.c[c]);
    d_uv[1] += double(given.d_out[c]) * (rows.b[c] - rows.c[c]);
  }
  for (int i = 0; i < args.n_diff && given.d_out_da != nullptr; ++i) {
    const int c = args.diff_attrs[i];
    for (int axis = 0; axis < 2; ++axis) {
      d_slopes[axis] += double(given.d_out_da[2 * i + axis]) * (rows.a[c] - rows.c[c]);
      d_slopes[2 + axis] += double(given.d_out_da[2 * i + axis]) * (rows.b[c] - rows.c[c]);
    }
  }
  for (int k = 0; k < 4; ++k) {
    if (d_rast) d_rast[k] = float(d_uv[k]);
    if (d_db) d_db[k] = float(d_slopes[k]);
  }
}

// Calls add(attribute, what one pixel has for it at corner k of its triangle).
template <typename Add>
MVDREAM_FAST_HD void visit_corner(const Attributes& args, int64_t pixel, int k, const Given& given, Add add) {
  const float u = args.rast[4 * pixel], v = args.rast[4 * pixel + 1];
  const double weight = k == 0 ? u : k == 1 ? v : 1.0 - u - v;
  for (int c = 0; c < args.n_attr && given.d_out != nullptr; ++c) add(c, weight * given.d_out[c]);
  if (given.d_out_da == nullptr) return;
  const float* db = args.rast_db + 4 * pixel;
  const double along_x = k == 0 ? db[0] : k == 1 ? db[2] : -double(db[0]) - db[2];
  const double along_y = k == 0 ? db[1] : k == 1 ? db[3] : -double(db[1]) - db[3];
  for (int i = 0; i < args.n_diff; ++i) {
    add(args.diff_attrs[i], along_x * given.d_out_da[2 * i] + along_y * given.d_out_da[2 * i + 1]);
  }
}

struct Gradients {
  const float *d_out, *d_out_da;  // cotangents of all pixels
  float *d_attr, *d_rast, *d_db;

  MVDREAM_FAST_HD Given at(const Attributes& args, int64_t pixel) const {
    return {d_out ? d_out + pixel * args.n_attr : nullptr, d_out_da ? d_out_da + pixel * 2 * args.n_diff : nullptr};
  }
};

}  // namespace MVDREAM_FAST_ISA
}  // namespace mvdream_fast
