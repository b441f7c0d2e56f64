// Entry points of Winograd's 3x3 convolution F(4x4, 3x3) on the CPU, around 36 matrix products that torch makes.
// Images are channels last; a tile is 4x4 pixels of the output, those of one image in rows, images slowest.
#pragma once

#include <cstdint>

#include "cpu/dispatch.h"

namespace mvdream_fast {

struct Images {
  int64_t n_images, height, width, n_channels;
};

}  // namespace mvdream_fast

// weight [O, 3, 3, C] -> out [36, O, C]
MVDREAM_FAST_CPU_OP(void, winograd_weights, const float* weight, int64_t n_out, int64_t n_channels, float* out,
                    int n_threads)

// x [B, h, w, C] -> out [36, n_tiles, C], for the tiles from `first` on
MVDREAM_FAST_CPU_OP(void, winograd_input, const float* x, const mvdream_fast::Images& images, int64_t first,
                    int64_t n_tiles, float* out, int n_threads)

// products [36, n_tiles, O] (images.n_channels is O here), bias [O] or null -> the tiles' pixels of y [B, h, w, O],
// which are `stride` numbers apart
MVDREAM_FAST_CPU_OP(void, winograd_output, const float* products, const float* bias, const mvdream_fast::Images& images,
                    int64_t first, int64_t n_tiles, float* y, int64_t stride, int n_threads)
