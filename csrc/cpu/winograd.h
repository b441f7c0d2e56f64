// Entry point of Winograd's 3x3 convolution F(4x4, 3x3) on the CPU, of stride 1 and padding 1, channels last.
#pragma once

#include <cstdint>

#include "cpu/dispatch.h"

namespace mvdream_fast {

struct Images {
  int64_t n_images, height, width, n_channels;
};

}  // namespace mvdream_fast

// x [B, h, w, C], weight [O, 3, 3, C], bias [O] or null -> y [B, h, w, O]
MVDREAM_FAST_CPU_OP(void, winograd_conv3x3, const float* x, const mvdream_fast::Images& images, const float* weight,
                    const float* bias, int64_t n_out, float* y, int n_threads)

// x [B, h, w, C], d_y [B, h, w, O] -> d_weight [O, 3, 3, C]
MVDREAM_FAST_CPU_OP(void, winograd_conv3x3_weights, const float* x, const mvdream_fast::Images& images,
                    const float* d_y, int64_t n_out, float* d_weight, int n_threads)

// weight [O, 3, 3, C] -> [C, 3, 3, O], each 3x3 turned by half a turn: what the gradient of x is a convolution with.
MVDREAM_FAST_CPU_OP(void, turn_weights, const float* weight, int64_t n_out, int64_t n_channels, float* out,
                    int n_threads)
