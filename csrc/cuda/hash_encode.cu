// The hash-grid encoding on GPUs: a thread takes one level of one sample, blocks go level by level so that a level's
// entries stay in L2. The table's gradient is summed by vector atomics, or in 64-bit fixed point, where no order of the
// threads makes a difference: 62 bits from the largest cotangent down, spared for as many samples as there are.
#include <algorithm>
#include <type_traits>

#include "cuda/encode.cuh"
#include "cuda/levels.h"
#include "cuda/ops.h"

namespace mvdream_fast::cuda {
namespace {

constexpr int kThreads = 256;
constexpr float kNotANumber = __builtin_nanf("");

// The block's level, and this thread's sample in it.
struct Place {
  int level;
  int64_t sample;
};

__device__ Place place_of(int64_t block, int64_t blocks_per_level) {
  return {static_cast<int>(block / blocks_per_level), block % blocks_per_level * blockDim.x + threadIdx.x};
}

__device__ bool unit_of(const Points& points, int64_t i, float* unit) {
  return to_unit(points.positions + 3 * i, points.scale, points.shift, unit);
}

template <int F>
__global__ void __launch_bounds__(kThreads, 4)
    encode_kernel(const __grid_constant__ HashGrid grid, const float* table, Points points, bool mark_nan,
                  int64_t per_level, float* out, Strides strides) {
  for (int64_t block = blockIdx.x; block < per_level * grid.n_levels; block += gridDim.x) {
    const Place at = place_of(block, per_level);
    if (at.sample >= points.n) continue;
    float unit[3], features[F];
    const bool numbers = unit_of(points, at.sample, unit) || !mark_nan;
    encode<F>(grid.levels[at.level], table, unit, features);
    float* to = out + at.sample * strides.per_sample + at.level * strides.per_level;
    for (int f = 0; f < F; ++f) to[f] = numbers ? features[f] : kNotANumber;
  }
}

template <int F>
__global__ void __launch_bounds__(kThreads, 4)
    scatter_kernel(const __grid_constant__ HashGrid grid, Points points, int64_t per_level, const float* d_out,
                   Strides strides, float* d_table) {
  for (int64_t block = blockIdx.x; block < per_level * grid.n_levels; block += gridDim.x) {
    const Place at = place_of(block, per_level);
    if (at.sample >= points.n) continue;
    float unit[3];
    if (!unit_of(points, at.sample, unit)) continue;
    const float* d = d_out + at.sample * strides.per_sample + at.level * strides.per_level;
    scatter<F>(grid.levels[at.level], unit, d, d_table);
  }
}

// Features [n_levels, n, F] as [n, n_levels, F], or back, in blocks of kRows samples by way of shared memory: both
// sides are read and written in whole sectors.
constexpr int kRows = 32;

__global__ void __launch_bounds__(kThreads)
    transpose_kernel(const float* from, int64_t n, int n_levels, int n_features, bool to_levels, float* to) {
  MVDREAM_FAST_DYNAMIC_SHARED(float, tile);  // [kRows, width + 1]
  const int width = n_levels * n_features;
  for (int64_t first = int64_t(blockIdx.x) * kRows; first < n; first += int64_t(gridDim.x) * kRows) {
    const int rows = n - first < kRows ? static_cast<int>(n - first) : kRows, run = rows * n_features;
    const auto by_samples = [&](int k, int64_t* at) {
      *at = first * width + k;
      return tile + k / width * (width + 1) + k % width;
    };
    const auto by_levels = [&](int k, int64_t* at) {
      const int level = k / run, rest = k % run;
      *at = (level * n + first) * n_features + rest;
      return tile + rest / n_features * (width + 1) + level * n_features + rest % n_features;
    };
    int64_t at;
    for (int k = threadIdx.x; k < rows * width; k += blockDim.x) {
      float* slot = to_levels ? by_samples(k, &at) : by_levels(k, &at);
      *slot = from[at];
    }
    __syncthreads();
    for (int k = threadIdx.x; k < rows * width; k += blockDim.x) {
      const float* slot = to_levels ? by_levels(k, &at) : by_samples(k, &at);
      to[at] = *slot;
    }
    __syncthreads();
  }
}

// Bits of the largest |d_out|: floats that are not negative are ordered as integers, and NaN is above all.
__global__ void __launch_bounds__(kThreads) largest_kernel(const float* d_out, int64_t n, int* largest) {
  int most = 0;
  for (int64_t i = thread_index(); i < n; i += n_threads()) {
    int bits;
    memcpy(&bits, d_out + i, sizeof bits);
    bits &= 0x7fffffff;
    most = bits > most ? bits : most;
  }
  atomicMax(largest, most);
}

// The power of two that fixed point is scaled by; 0 where a cotangent is no number.
__device__ float fixed_scale(const int* largest, int64_t n) {
  const int exponent = (*largest >> 23) - 126;  // largest < 2^exponent
  if (exponent > 128) return 0;
  int bits = 62 - exponent;
  for (int64_t samples = n; samples > 0; samples >>= 1) --bits;  // the weights of a sample's 8 vertices add up to 1
  return ldexpf(1.0f, bits < 126 ? bits : 126);
}

template <int F>
__global__ void __launch_bounds__(kThreads, 4)
    scatter_fixed_kernel(const __grid_constant__ HashGrid grid, Points points, int64_t per_level, const float* d_out,
                         Strides strides, const int* largest, unsigned long long* sums) {
  const float scale = fixed_scale(largest, points.n);
  if (scale == 0) return;
  for (int64_t block = blockIdx.x; block < per_level * grid.n_levels; block += gridDim.x) {
    const Place at = place_of(block, per_level);
    if (at.sample >= points.n) continue;
    float unit[3];
    if (!unit_of(points, at.sample, unit)) continue;
    const GridLevel& level = grid.levels[at.level];
    const Cell cell = locate(level, unit);
    const float* d = d_out + at.sample * strides.per_sample + at.level * strides.per_level;
    for (int corner = 0; corner < 8; ++corner) {
      unsigned long long* to = sums + (level.offset + cell.index[corner]) * F;
      const float weight = corner_weight(cell, corner);
      for (int f = 0; f < F; ++f) {
        const long long term = static_cast<long long>(rintf(weight * d[f] * scale));
        atomicAdd(to + f, static_cast<unsigned long long>(term));
      }
    }
  }
}

__global__ void __launch_bounds__(kThreads, 4)
    from_fixed_kernel(const unsigned long long* sums, int64_t size, const int* largest, int64_t n, float* d_table) {
  const double scale = fixed_scale(largest, n);
  for (int64_t i = thread_index(); i < size; i += n_threads()) {
    d_table[i] =
        scale == 0 ? kNotANumber : static_cast<float>(static_cast<double>(static_cast<long long>(sums[i])) / scale);
  }
}

// Gradients of clamped coordinates vanish outside the cube, whose faces count as inside.
template <int F>
__global__ void __launch_bounds__(kThreads, F == 8 ? 2 : 4)
    d_positions_kernel(const __grid_constant__ HashGrid grid, const float* table, Points points, const float* d_out,
                       Strides strides, bool add, float* d_positions) {
  for (int64_t i = thread_index(); i < points.n; i += n_threads()) {
    float unit[3], d_unit[3] = {0, 0, 0};
    const bool numbers = unit_of(points, i, unit);
    for (int l = 0; l < grid.n_levels; ++l) {
      add_d_unit<F>(grid.levels[l], table, unit, d_out + i * strides.per_sample + l * strides.per_level, d_unit);
    }
    for (int axis = 0; axis < 3; ++axis) {
      float* to = d_positions + 3 * i + axis;
      const float x = fmaf(points.positions[3 * i + axis], points.scale, points.shift);
      const float d = x >= 0 && x <= 1 ? d_unit[axis] * points.scale : 0.0f;
      *to = !numbers ? kNotANumber : add ? *to + d : d;
    }
  }
}

// Blocks for every level, and of one of them.
int64_t per_level(int64_t n) { return (n + kThreads - 1) / kThreads; }
int64_t blocks_of(const HashGrid& grid, int64_t n) { return blocks_for(per_level(n) * grid.n_levels, 1, 1 << 30); }

void transpose_levels(const HashGrid& grid, const float* from, int64_t n, bool to_levels, float* to,
                      cudaStream_t stream) {
  launch("hash_encode", transpose_kernel, blocks_for(n, kRows), kThreads, kRows * (grid.width() + 1) * sizeof(float),
         stream, from, n, grid.n_levels, grid.n_features, to_levels, to);
}

// Calls body(first sample, how many) for each slab.
template <typename Body>
void for_slabs(int64_t n, Body body) {
  for (int64_t first = 0; first < n; first += slab_samples) body(first, std::min(n - first, slab_samples));
}

}  // namespace

void encode_levels(const HashGrid& grid, const float* table, const Points& points, bool mark_nan, float* out,
                   Strides strides, cudaStream_t stream) {
  with_features(grid.n_features, [&](auto f) {
    launch("hash_encode forward", encode_kernel<f>, blocks_of(grid, points.n), kThreads, 0, stream, grid, table, points,
           mark_nan, per_level(points.n), out, strides);
  });
}

void scatter_levels(const HashGrid& grid, const Points& points, const float* d_out, Strides strides, float* d_table,
                    cudaStream_t stream) {
  with_features(grid.n_features, [&](auto f) {
    launch("hash_encode backward", scatter_kernel<f>, blocks_of(grid, points.n), kThreads, 0, stream, grid, points,
           per_level(points.n), d_out, strides, d_table);
  });
}

void scatter_fixed(const HashGrid& grid, const Points& points, const float* d_out, Strides strides, float* d_table,
                   cudaStream_t stream) {
  const char* name = "hash_encode backward, deterministic";
  const int64_t size = grid.n_entries() * grid.n_features, n_out = points.n * grid.width();
  const Scratch<unsigned long long> sums(size, stream);
  const Scratch<int> largest(1, stream);
  sums.zero(size);
  largest.zero(1);
  launch(name, largest_kernel, blocks_for(n_out, kThreads, 1024), kThreads, 0, stream, d_out, n_out, largest.get());
  with_features(grid.n_features, [&](auto f) {
    launch(name, scatter_fixed_kernel<f>, blocks_of(grid, points.n), kThreads, 0, stream, grid, points,
           per_level(points.n), d_out, strides, largest.get(), sums.get());
  });
  launch(name, from_fixed_kernel, blocks_for(size, kThreads), kThreads, 0, stream, sums.get(), size, largest.get(),
         points.n, d_table);
}

void pull_positions(const HashGrid& grid, const float* table, const Points& points, const float* d_out, Strides strides,
                    bool add, float* d_positions, cudaStream_t stream) {
  with_features(grid.n_features, [&](auto f) {
    launch("hash_encode backward", d_positions_kernel<f>, blocks_for(points.n, kThreads), kThreads, 0, stream, grid,
           table, points, d_out, strides, add, d_positions);
  });
}

bool hash_encode_forward(const HashGrid& grid, const float* table, const float* positions, int64_t n, float* out,
                         Queue queue) {
  const DeviceGuard guard(queue.device);
  if (n < level_major_from) {
    encode_levels(grid, table, {positions, n}, true, out, sample_major(grid), queue.stream);
    return true;
  }
  const Scratch<float> features(std::min(n, slab_samples) * grid.width(), queue.stream);
  for_slabs(n, [&](int64_t first, int64_t m) {
    const Points points = {positions + 3 * first, m};
    encode_levels(grid, table, points, true, features.get(), level_major(grid, m), queue.stream);
    transpose_levels(grid, features.get(), m, false, out + first * grid.width(), queue.stream);
  });
  return true;
}

bool hash_encode_backward(const HashGrid& grid, const float* table, const float* positions, int64_t n,
                          const float* d_out, float* d_table, float* d_positions, Queue queue) {
  const DeviceGuard guard(queue.device);
  const bool fixed = d_table != nullptr && queue.deterministic, atomics = d_table != nullptr && !fixed;
  if (fixed) scatter_fixed(grid, {positions, n}, d_out, sample_major(grid), d_table, queue.stream);
  if (atomics) {
    const int64_t size = grid.n_entries() * grid.n_features;
    check(cudaMemsetAsync(d_table, 0, size * sizeof(float), queue.stream), "hash_encode backward");
  }
  const auto pass_on = [&](const Points& points, const float* d, Strides strides, float* to) {
    if (atomics) scatter_levels(grid, points, d, strides, d_table, queue.stream);
    if (to != nullptr) pull_positions(grid, table, points, d, strides, false, to, queue.stream);
  };
  if (n < level_major_from || (!atomics && d_positions == nullptr)) {
    pass_on({positions, n}, d_out, sample_major(grid), d_positions);
    return true;
  }
  const Scratch<float> d_features(std::min(n, slab_samples) * grid.width(), queue.stream);
  for_slabs(n, [&](int64_t first, int64_t m) {
    transpose_levels(grid, d_out + first * grid.width(), m, true, d_features.get(), queue.stream);
    float* to = d_positions == nullptr ? nullptr : d_positions + 3 * first;
    pass_on({positions + 3 * first, m}, d_features.get(), level_major(grid, m), to);
  });
  return true;
}

}  // namespace mvdream_fast::cuda
