// One level of the hash grid for one sample: its cell, the vertices' entries, and the ways back to both.
#pragma once

#include <cstring>

#include "cuda/launch.cuh"
#include "hash_grid.h"

namespace mvdream_fast::cuda {

// The cell of a point: rows of its 8 vertices in the level, and the weight of the upper side along each axis.
struct Cell {
  uint32_t index[8];
  float high[3];
};

// fmaf rounds once, as tiny-cuda-nn and the CPU do: a fine level's fraction has few bits to lose.
MVDREAM_FAST_HD Cell locate(const GridLevel& level, const float* unit) {
  Cell cell;
  uint32_t vertex[3];
  for (int axis = 0; axis < 3; ++axis) {
    const float lattice = fmaf(unit[axis], level.scale, 0.5f);
    vertex[axis] = static_cast<uint32_t>(lattice);
    cell.high[axis] = lattice - static_cast<float>(vertex[axis]);
  }
  device::cell_indices<uint32_t>(level, vertex[0], vertex[1], vertex[2],
                                 [&cell](int corner, uint32_t index) { cell.index[corner] = index; });
  return cell;
}

MVDREAM_FAST_HD float side_weight(const Cell& cell, int corner, int axis) {
  return corner >> axis & 1 ? cell.high[axis] : 1.0f - cell.high[axis];
}

MVDREAM_FAST_HD float corner_weight(const Cell& cell, int corner) {
  return side_weight(cell, corner, 0) * side_weight(cell, corner, 1) * side_weight(cell, corner, 2);
}

// d weight / d lattice coordinate along `axis`.
MVDREAM_FAST_HD float corner_slope(const Cell& cell, int corner, int axis) {
  const float others = side_weight(cell, corner, (axis + 1) % 3) * side_weight(cell, corner, (axis + 2) % 3);
  return corner >> axis & 1 ? others : -others;
}

template <int F>
struct alignas(F % 4 == 0 ? 16 : 4 * F) Entry {
  float v[F];
};

// In loads as wide as the entry; tables are aligned to 16 bytes.
template <int F>
__device__ inline Entry<F> load_entry(const float* entries, uint32_t index) {
  return reinterpret_cast<const Entry<F>*>(entries)[index];
}

// One atomic for two features where the GPU has it (sm_90 on); the host build takes the same way.
__device__ inline void add_pair(float* to, float a, float b) {
#if !defined(__CUDACC__) || (defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900)
  float2 both;
  both.x = a;
  both.y = b;
  atomicAdd(reinterpret_cast<float2*>(to), both);
#else
  atomicAdd(to, a);
  atomicAdd(to + 1, b);
#endif
}

__device__ inline void add_quad(float* to, const float* v) {
#if !defined(__CUDACC__) || (defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900)
  float4 all;
  all.x = v[0];
  all.y = v[1];
  all.z = v[2];
  all.w = v[3];
  atomicAdd(reinterpret_cast<float4*>(to), all);
#else
  for (int f = 0; f < 4; ++f) atomicAdd(to + f, v[f]);
#endif
}

template <int F>
__device__ inline void add_entry(float* entries, uint32_t index, float weight, const float* d) {
  float* to = entries + int64_t(index) * F;
  if constexpr (F == 1) {
    atomicAdd(to, weight * d[0]);
  } else if constexpr (F == 2) {
    add_pair(to, weight * d[0], weight * d[1]);
  } else {
    for (int f = 0; f < F; f += 4) {
      const float v[4] = {weight * d[f], weight * d[f + 1], weight * d[f + 2], weight * d[f + 3]};
      add_quad(to + f, v);
    }
  }
}

template <int F>
__device__ inline void encode(const GridLevel& level, const float* table, const float* unit, float* out) {
  const Cell cell = locate(level, unit);
  const float* entries = table + level.offset * F;
  for (int f = 0; f < F; ++f) out[f] = 0;
#pragma unroll
  for (int corner = 0; corner < 8; ++corner) {
    const Entry<F> entry = load_entry<F>(entries, cell.index[corner]);
    const float weight = corner_weight(cell, corner);
    for (int f = 0; f < F; ++f) out[f] += weight * entry.v[f];
  }
}

template <int F>
__device__ inline void scatter(const GridLevel& level, const float* unit, const float* d, float* d_table) {
  const Cell cell = locate(level, unit);
#pragma unroll
  for (int corner = 0; corner < 8; ++corner) {
    add_entry<F>(d_table + level.offset * F, cell.index[corner], corner_weight(cell, corner), d);
  }
}

// Adds d features / d unit coordinates of one level to d_unit [3].
template <int F>
__device__ inline void add_d_unit(const GridLevel& level, const float* table, const float* unit, const float* d,
                                  float* d_unit) {
  const Cell cell = locate(level, unit);
  const float* entries = table + level.offset * F;
#pragma unroll
  for (int corner = 0; corner < 8; ++corner) {
    const Entry<F> entry = load_entry<F>(entries, cell.index[corner]);
    float dot = 0;
    for (int f = 0; f < F; ++f) dot += entry.v[f] * d[f];
    for (int axis = 0; axis < 3; ++axis) d_unit[axis] += dot * corner_slope(cell, corner, axis) * level.scale;
  }
}

// Clamps to the unit cube; of NaN it makes 0 and returns false.
MVDREAM_FAST_HD bool to_unit(const float* position, float scale, float shift, float* unit) {
  bool numbers = true;
  for (int axis = 0; axis < 3; ++axis) {
    numbers = numbers && position[axis] == position[axis];
    unit[axis] = fminf(fmaxf(fmaf(position[axis], scale, shift), 0.0f), 1.0f);
  }
  return numbers;
}

// Calls body with the number of features as a compile-time constant.
template <typename Body>
void with_features(int n_features, Body body) {
  if (n_features == 1) return body(std::integral_constant<int, 1>());
  if (n_features == 2) return body(std::integral_constant<int, 2>());
  if (n_features == 4) return body(std::integral_constant<int, 4>());
  return body(std::integral_constant<int, 8>());
}

}  // namespace mvdream_fast::cuda
