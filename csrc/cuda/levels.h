// The hash grid level by level, shared by the encoding and the field: while one level of many samples is worked on, its
// entries stay in L2, which not all levels together fit into.
#pragma once

#include "cuda/ops.h"
#include "hash_grid.h"

namespace mvdream_fast::cuda {

// From so many samples on it pays to write their features down, [n_levels, n, F], for so many samples at a time; fewer
// samples are encoded where they are used. Tests make both smaller.
inline int64_t level_major_from = 1 << 16;
inline int64_t slab_samples = 1 << 18;

// Where level l's features of sample i begin: i * per_sample + l * per_level.
struct Strides {
  int64_t per_sample, per_level;
};
inline Strides sample_major(const HashGrid& grid) { return {grid.width(), grid.n_features}; }
inline Strides level_major(const HashGrid& grid, int64_t n) { return {grid.n_features, n * grid.n_features}; }

// Samples with unit coordinates clamp(positions * scale + shift).
struct Points {
  const float* positions;  // [n, 3]
  int64_t n;
  float scale = 1, shift = 0;
};

// Features of all levels. With mark_nan those of a NaN position are NaN, else those of the cube's corner.
void encode_levels(const HashGrid& grid, const float* table, const Points& points, bool mark_nan, float* out,
                   Strides strides, CUstream_st* stream);

// Adds what the features' gradients d_out pass on: to the table by atomics, NaN positions left out.
void scatter_levels(const HashGrid& grid, const Points& points, const float* d_out, Strides strides, float* d_table,
                    CUstream_st* stream);

// Overwrites d_table with the same sums in fixed point, equal to the bit in any order of the samples. Where any of
// d_out is no finite number, all of d_table is NaN.
void scatter_fixed(const HashGrid& grid, const Points& points, const float* d_out, Strides strides, float* d_table,
                   CUstream_st* stream);

// What d_out passes on to the positions [n, 3]: overwrites them, with NaN for NaN, or adds to them.
void pull_positions(const HashGrid& grid, const float* table, const Points& points, const float* d_out, Strides strides,
                    bool add, float* d_positions, CUstream_st* stream);

}  // namespace mvdream_fast::cuda
