// Entry points of the hash-grid encoding on the CPU. Both return false when a position is NaN.
#pragma once

#include "cpu/dispatch.h"
#include "hash_grid.h"

// positions [P, 3], table [n_entries, F] -> out [P, n_levels * F]
MVDREAM_FAST_CPU_OP(bool, hash_encode_forward, const mvdream_fast::HashGrid& grid, const float* table,
                    const float* positions, int64_t n, float* out, int n_threads)

// d_out [P, n_levels * F] -> d_table, overwritten, and d_positions [P, 3]; either may be null.
MVDREAM_FAST_CPU_OP(bool, hash_encode_backward, const mvdream_fast::HashGrid& grid, const float* table,
                    const float* positions, int64_t n, const float* d_out, float* d_table, float* d_positions,
                    int n_threads)
