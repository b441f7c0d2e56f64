// CPU entry points of the rasteriser's ops. Pointers are to contiguous arrays. Every output belongs to one worker, or is
// summed in the order of the pixels by one, so that results do not depend on n_threads.
#pragma once

#include <cstdint>

#include "cpu/dispatch.h"

namespace mvdream_fast {

enum RasterStatus { kRasterFine = 0, kNotFinite = 1, kNoVertex = 2, kNoFace = 3 };

struct Meshes {
  const float* pos;    // [B, V, 4] clip space
  const int32_t* tri;  // [F, 3]
  int64_t n_images, n_vertices, n_faces;
  int height, width;
};

// Attributes [B, V, A], or [V, A] of all images where stride is 0, of the pixels of `rast` [B, H, W, 4].
struct Attributes {
  const float* attr;
  const float* rast;
  const float* rast_db;  // or null, as all that follows from it
  const int32_t* tri;
  const int32_t* diff_attrs;  // [n_diff]: the attributes whose derivatives are wanted
  int64_t n_images, n_pixels, n_vertices, n_faces, stride;
  int n_attr, n_diff;
};

// Where the fragments of some faces go: face and pixel [K], values [K, 3] (u, v, z/w).
struct Fragments {
  const int64_t* starts;  // [F]: of each face's fragments among those of all
  int64_t first_face, end_face;
  int64_t *face, *pixel;
  float* values;
};

// What antialias knows of the outlines in images of n_channels colours.
struct Silhouettes {
  Meshes meshes;
  const float* rast;        // [B, H, W, 4]
  const int32_t* opposite;  // [F, 3]: the vertex across the edge opposite to each corner, -1 where there is none
  int n_channels;
};

// A texture [B, T, C], or [T, C] of all images where stride is 0: T texels of n_levels levels, the largest of width x
// height first, each half of the one before. uv [B, pixels, 2], uv_da [B, pixels, 4] or null.
struct Textured {
  const float *tex, *uv, *uv_da;
  int64_t n_images, n_pixels, n_texels, stride;
  int height, width, n_levels, n_channels;
  int filter, boundary;  // TextureFilter and TextureBoundary (texture.h)
};

}  // namespace mvdream_fast

// rast, rast_db [B, H, W, 4]; returns a RasterStatus, where that is not kRasterFine nothing is written.
MVDREAM_FAST_CPU_OP(int, rasterize_forward, const mvdream_fast::Meshes& meshes, float* rast, float* rast_db,
                    int n_threads)
// d_rast, d_db: [B, H, W, 4], either may be null; d_pos [B, V, 4].
MVDREAM_FAST_CPU_OP(void, rasterize_backward, const mvdream_fast::Meshes& meshes, const float* rast,
                    const float* d_rast, const float* d_db, float* d_pos, int n_threads)

// Of the first image: the pixels that each face covers [F], by a RasterStatus; then faces and pixels in their order.
MVDREAM_FAST_CPU_OP(int, fragment_counts, const mvdream_fast::Meshes& meshes, int64_t* counts, int n_threads)
MVDREAM_FAST_CPU_OP(void, fragment_fill, const mvdream_fast::Meshes& meshes, const mvdream_fast::Fragments& out,
                    int n_threads)

// out [B, H, W, A], out_da [B, H, W, 2 n_diff]; returns a RasterStatus.
MVDREAM_FAST_CPU_OP(int, interpolate_forward, const mvdream_fast::Attributes& args, float* out, float* out_da,
                    int n_threads)
// Cotangents and gradients may be null each; d_attr as attr.
MVDREAM_FAST_CPU_OP(void, interpolate_backward, const mvdream_fast::Attributes& args, const float* d_out,
                    const float* d_out_da, float* d_attr, float* d_rast, float* d_db, int n_threads)

// color, out [B, H, W, C]; crossings [B, H, W, 2], of a pixel with the next in its row and in its column (antialias.h).
// Returns a RasterStatus.
MVDREAM_FAST_CPU_OP(int, antialias_forward, const mvdream_fast::Silhouettes& args, const float* color, float* crossings,
                    float* out, int n_threads)
// d_color [B, H, W, C] and d_pos [B, V, 4] may be null.
MVDREAM_FAST_CPU_OP(void, antialias_backward, const mvdream_fast::Silhouettes& args, const float* color,
                    const float* crossings, const float* d_out, float* d_color, float* d_pos, int n_threads)

// out [B, pixels, C]; d_tex as tex, d_uv and d_da as uv and uv_da, each may be null.
MVDREAM_FAST_CPU_OP(void, texture_forward, const mvdream_fast::Textured& args, float* out, int n_threads)
MVDREAM_FAST_CPU_OP(void, texture_backward, const mvdream_fast::Textured& args, const float* d_out, float* d_tex,
                    float* d_uv, float* d_da, int n_threads)
