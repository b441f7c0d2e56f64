// Entry points of softmax attention on the CPU, in float32.
#pragma once

#include <cstdint>

#include "cpu/dispatch.h"

namespace mvdream_fast {

// Tokens as they lie in memory, [B * n_views, n_tokens, H, D] of any strides, and null or what is added to every token
// of a view, [B * n_views, H, D]. A scene's tokens are those of its views, one view after the other.
struct Tokens {
  const float* data;
  int64_t image, token, head, number;  // strides
  int64_t n_views, n_tokens;
  const float* camera;

  int64_t per_scene() const { return n_views * n_tokens; }
};

struct Attention {
  Tokens q, k, v;
  int64_t n_scenes, n_heads, width;
  float scale;
};

}  // namespace mvdream_fast

// y [B * n_views, n_tokens, H, D], the views and tokens those of q; lse [B, H, n_views * n_tokens] or null
MVDREAM_FAST_CPU_OP(void, attention_forward, const mvdream_fast::Attention& attention, float* y, float* lse,
                    int n_threads)
