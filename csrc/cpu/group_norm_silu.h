// Entry points of the embedding add, GroupNorm and SiLU on the CPU. Images are channels last: [B*V, h*w, C].
#pragma once

#include <cstdint>

#include "cpu/dispatch.h"

namespace mvdream_fast {

// What both directions read. emb may be null; its rows are emb_stride floats apart. `silu` false stops after the norm.
struct GroupNorm {
  const float *x, *weight, *bias, *emb;
  int64_t emb_stride, n_images, n_pixels, n_channels, n_groups;
  bool silu;
};

}  // namespace mvdream_fast

// -> y like x, mean and 1 / standard deviation [B*V, n_groups] (both may be null)
MVDREAM_FAST_CPU_OP(void, group_norm_silu_forward, const mvdream_fast::GroupNorm& norm, float eps, float* y,
                    float* mean, float* rstd, int n_threads)

// d_y like x, mean, rstd -> d_x like x, d_weight [C], d_bias [C], d_emb [B*V, C] (null without emb)
MVDREAM_FAST_CPU_OP(void, group_norm_silu_backward, const mvdream_fast::GroupNorm& norm, const float* d_y,
                    const float* mean, const float* rstd, float* d_x, float* d_weight, float* d_bias, float* d_emb,
                    int n_threads)
