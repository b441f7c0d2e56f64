// Entry points of the radiance field on the CPU. Both return false when a position is NaN. Positions [P, 3] are in
// scene units. A field without a colour network (n_layers 0) has no rgb.
#pragma once

#include "cpu/dispatch.h"
#include "field_types.h"

namespace mvdream_fast {

// Gradients of a field's inputs: each is overwritten, and may be null when it is not wanted. Those of a network are
// all its matrices in order.
struct FieldGradients {
  float* table = nullptr;
  float* density = nullptr;
  float* color = nullptr;
  float* positions = nullptr;
};

}  // namespace mvdream_fast

// -> sigmas [P], rgb [P, 3] (null without a colour network)
MVDREAM_FAST_CPU_OP(bool, field_forward, const mvdream_fast::Field& field, const float* positions, int64_t n,
                    float* sigmas, float* rgb, int n_threads)

// d_sigmas [P], d_rgb [P, 3] (either may be null: zero) -> gradients
MVDREAM_FAST_CPU_OP(bool, field_backward, const mvdream_fast::Field& field, const float* positions, int64_t n,
                    const float* d_sigmas, const float* d_rgb, const mvdream_fast::FieldGradients& gradients,
                    int n_threads)
