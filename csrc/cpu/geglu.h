// Entry points of the gated GELU on the CPU. Rows of x are [value | gate], each n_columns wide.
#pragma once

#include <cstdint>

#include "cpu/dispatch.h"

// x [n_rows, 2 * n_columns] -> y [n_rows, n_columns]
MVDREAM_FAST_CPU_OP(void, geglu_forward, const float* x, int64_t n_rows, int64_t n_columns, float* y, int n_threads)

// d_y [n_rows, n_columns], x -> d_x [n_rows, 2 * n_columns]
MVDREAM_FAST_CPU_OP(void, geglu_backward, const float* d_y, const float* x, int64_t n_rows, int64_t n_columns,
                    float* d_x, int n_threads)
