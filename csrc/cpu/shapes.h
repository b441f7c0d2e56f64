// CPU entry points of the rasteriser's ops. Every output belongs to one worker, or is summed in the order of the pixels
// by one, so that results do not depend on n_threads.
#pragma once

#include "cpu/dispatch.h"
#include "shape_types.h"

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

// opposite [F, 3]: the vertex of the other triangle across the edge opposite to each corner, -1 where there is none or
// more than one. Any numbers may stand for vertices.
MVDREAM_FAST_CPU_OP(void, edge_topology, const int32_t* tri, int64_t n_faces, int32_t* opposite, int n_threads)

// color, out [B, H, W, C]; crossings [B, H, W, 2], of a pixel with the next in its row and in its column (antialias.h).
// Returns a RasterStatus.
MVDREAM_FAST_CPU_OP(int, antialias_forward, const mvdream_fast::Silhouettes& args, const float* color,
                    int32_t* crossings, float* out, int n_threads)
// d_color [B, H, W, C] and d_pos [B, V, 4] may be null.
MVDREAM_FAST_CPU_OP(void, antialias_backward, const mvdream_fast::Silhouettes& args, const float* color,
                    const int32_t* crossings, const float* d_out, float* d_color, float* d_pos, int n_threads)

// out [B, pixels, C]; d_tex as tex, d_uv and d_da as uv and uv_da, each may be null.
MVDREAM_FAST_CPU_OP(void, texture_forward, const mvdream_fast::Textured& args, float* out, int n_threads)
MVDREAM_FAST_CPU_OP(void, texture_backward, const mvdream_fast::Textured& args, const float* d_out, float* d_tex,
                    float* d_uv, float* d_da, int n_threads)
