// The table's gradient in fixed point, shared by the encoding and the field.
#pragma once

#include "cuda/ops.h"
#include "hash_grid.h"

namespace mvdream_fast::cuda {

// Overwrites d_table with the sums over samples at positions * scale + shift, equal to the bit in any order of them;
// d_out [n, width]. Where any of d_out is no finite number, all of d_table is NaN.
void scatter_fixed(const HashGrid& grid, const float* positions, float scale, float shift, int64_t n,
                   const float* d_out, float* d_table, CUstream_st* stream);

}  // namespace mvdream_fast::cuda
