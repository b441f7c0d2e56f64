// The hash-grid encoding on GPUs: a thread takes one level of one sample, blocks go level by level so that a level's
// entries stay in L2. The table's gradient is summed by vector atomics, or in 64-bit fixed point, where no order of the
// threads makes a difference: 62 bits from the largest cotangent down, spared for as many samples as there are.
#include <type_traits>

#include "cuda/encode.cuh"
#include "cuda/fixed_point.h"
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

template <int F>
__global__ void __launch_bounds__(kThreads, 4)
    encode_kernel(const __grid_constant__ HashGrid grid, const float* table, const float* positions, int64_t n,
                  int64_t per_level, float* out) {
  for (int64_t block = blockIdx.x; block < per_level * grid.n_levels; block += gridDim.x) {
    const Place at = place_of(block, per_level);
    if (at.sample >= n) continue;
    float unit[3], features[F];
    const bool numbers = to_unit(positions + 3 * at.sample, 1, 0, unit);
    encode<F>(grid.levels[at.level], table, unit, features);
    float* to = out + at.sample * grid.width() + at.level * F;
    for (int f = 0; f < F; ++f) to[f] = numbers ? features[f] : kNotANumber;
  }
}

template <int F>
__global__ void __launch_bounds__(kThreads, 4)
    scatter_kernel(const __grid_constant__ HashGrid grid, const float* positions, int64_t n, int64_t per_level,
                   const float* d_out, float* d_table) {
  for (int64_t block = blockIdx.x; block < per_level * grid.n_levels; block += gridDim.x) {
    const Place at = place_of(block, per_level);
    if (at.sample >= n) continue;
    float unit[3];
    if (!to_unit(positions + 3 * at.sample, 1, 0, unit)) continue;
    scatter<F>(grid.levels[at.level], unit, d_out + at.sample * grid.width() + at.level * F, d_table);
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
    scatter_fixed_kernel(const __grid_constant__ HashGrid grid, const float* positions, int64_t n, int64_t per_level,
                         float scale_in, float shift, const float* d_out, const int* largest,
                         unsigned long long* sums) {
  const float scale = fixed_scale(largest, n);
  if (scale == 0) return;
  for (int64_t block = blockIdx.x; block < per_level * grid.n_levels; block += gridDim.x) {
    const Place at = place_of(block, per_level);
    if (at.sample >= n) continue;
    float unit[3];
    if (!to_unit(positions + 3 * at.sample, scale_in, shift, unit)) continue;
    const GridLevel& level = grid.levels[at.level];
    const Cell cell = locate(level, unit);
    const float* d = d_out + at.sample * grid.width() + at.level * F;
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
__global__ void __launch_bounds__(kThreads, 4)
    d_positions_kernel(const __grid_constant__ HashGrid grid, const float* table, const float* positions, int64_t n,
                       const float* d_out, float* d_positions) {
  for (int64_t i = thread_index(); i < n; i += n_threads()) {
    float unit[3], d_unit[3] = {0, 0, 0};
    const bool numbers = to_unit(positions + 3 * i, 1, 0, unit);
    for (int l = 0; l < grid.n_levels; ++l) {
      add_d_unit<F>(grid.levels[l], table, unit, d_out + i * grid.width() + l * F, d_unit);
    }
    for (int axis = 0; axis < 3; ++axis) {
      const float x = positions[3 * i + axis];
      d_positions[3 * i + axis] = !numbers ? kNotANumber : x >= 0 && x <= 1 ? d_unit[axis] : 0.0f;
    }
  }
}

}  // namespace

void scatter_fixed(const HashGrid& grid, const float* positions, float scale, float shift, int64_t n,
                   const float* d_out, float* d_table, cudaStream_t stream) {
  const char* name = "hash_encode backward, deterministic";
  const int64_t size = grid.n_entries() * grid.n_features, per_level = (n + kThreads - 1) / kThreads;
  const Scratch<unsigned long long> sums(size, stream);
  const Scratch<int> largest(1, stream);
  sums.zero(size);
  largest.zero(1);
  launch(name, largest_kernel, blocks_for(n * grid.width(), kThreads, 1024), kThreads, 0, stream, d_out,
         n * grid.width(), largest.get());
  with_features(grid.n_features, [&](auto f) {
    launch(name, scatter_fixed_kernel<f>, blocks_for(per_level * grid.n_levels, 1, 1 << 30), kThreads, 0, stream, grid,
           positions, n, per_level, scale, shift, d_out, largest.get(), sums.get());
  });
  launch(name, from_fixed_kernel, blocks_for(size, kThreads), kThreads, 0, stream, sums.get(), size, largest.get(), n,
         d_table);
}

bool hash_encode_forward(const HashGrid& grid, const float* table, const float* positions, int64_t n, float* out,
                         Queue queue) {
  const DeviceGuard guard(queue.device);
  const int64_t per_level = (n + kThreads - 1) / kThreads;
  with_features(grid.n_features, [&](auto f) {
    launch("hash_encode forward", encode_kernel<f>, blocks_for(per_level * grid.n_levels, 1, 1 << 30), kThreads, 0,
           queue.stream, grid, table, positions, n, per_level, out);
  });
  return true;
}

bool hash_encode_backward(const HashGrid& grid, const float* table, const float* positions, int64_t n,
                          const float* d_out, float* d_table, float* d_positions, Queue queue) {
  const DeviceGuard guard(queue.device);
  const int64_t per_level = (n + kThreads - 1) / kThreads;
  with_features(grid.n_features, [&](auto f) {
    if (d_table != nullptr && queue.deterministic) {
      scatter_fixed(grid, positions, 1, 0, n, d_out, d_table, queue.stream);
    } else if (d_table != nullptr) {
      check(cudaMemsetAsync(d_table, 0, grid.n_entries() * f * sizeof(float), queue.stream), "hash_encode backward");
      launch("hash_encode backward", scatter_kernel<f>, blocks_for(per_level * grid.n_levels, 1, 1 << 30), kThreads, 0,
             queue.stream, grid, positions, n, per_level, d_out, d_table);
    }
    if (d_positions != nullptr) {
      launch("hash_encode backward", d_positions_kernel<f>, blocks_for(n, kThreads), kThreads, 0, queue.stream, grid,
             table, positions, n, d_out, d_positions);
    }
  });
  return true;
}

}  // namespace mvdream_fast::cuda
