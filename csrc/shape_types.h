// The arguments of the rasteriser's ops, for every backend. Pointers are to contiguous arrays.
#pragma once

#include <cstdint>

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
