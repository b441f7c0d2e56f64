// The field's forward pass on GPUs. Of few samples no feature leaves the registers of its warp; those of many are
// encoded level by level into scratch memory first. Activations never leave the registers.
#include <algorithm>

#include "cuda/levels.h"
#include "cuda/networks.cuh"
#include "cuda/ops.h"

namespace mvdream_fast::cuda {
namespace {

constexpr int kThreads = 128, kMostBlocks = 2112;  // 16 of the H100's 132 processors' each
constexpr float kNotANumber = __builtin_nanf("");

__global__ void pad_kernel(const __grid_constant__ Field field, const __grid_constant__ Networks networks, float* out) {
  for (int which = 0; which < 2; ++which) {
    const Mlp& mlp = which == 0 ? field.density : field.color;
    for (int i = 0; i < networks.n_layers[which]; ++i) {
      const Networks::Layer& layer = networks.layers[which][i];
      for (int64_t at = thread_index(); at < layer.rows * layer.stride; at += n_threads()) {
        const int row = static_cast<int>(at) / layer.stride, column = static_cast<int>(at) % layer.stride;
        const bool inside = row < mlp.sizes[i + 1] && column < mlp.sizes[i];
        out[layer.offset + at] = inside ? mlp.weights[i][int64_t(row) * mlp.sizes[i] + column] : 0.0f;
      }
    }
  }
}

template <int W, bool kTf32, bool kStaged, bool kFused>
__global__ void __launch_bounds__(kThreads, W == 32 ? 4 : 2)
    field_forward_kernel(const __grid_constant__ Field field, const __grid_constant__ Networks networks,
                         const float* padded_weights, const float* features, const float* positions, int64_t n,
                         float* sigmas, float* rgb) {
  MVDREAM_FAST_DYNAMIC_SHARED(float, shared);
  const float* weights = stage_weights<kStaged>(networks, padded_weights, shared);
  for (int64_t first = warp_index() * kRows; first < n; first += n_warps() * kRows) {
    Sample samples[2];
    for (int s = 0; s < 2; ++s) {
      const int64_t i = first + row_of_lane() + 8 * s;
      samples[s] = make_sample(field, positions + 3 * i, i < n, i);
    }
    const auto pair = [&](int s, int column, float* out) {
      if constexpr (kFused) {
        encode_pair(field.grid, field.table, samples[s].unit, column, out);
      } else {
        load_pair(field.grid, features, n, samples[s].i, column, out);
      }
    };
    float density[4], color[4];
    evaluate<W, kTf32>(networks, weights, pair, density, color);
    for (int e = 0; e < 4; ++e) {
      const Sample& sample = samples[e / 2];
      const int column = column_of_lane() + e % 2;
      if (sample.i >= n) continue;
      if (column == 0) {
        const float sigma = density_of(field, biased(field, sample.position, density[e]));
        sigmas[sample.i] = sample.numbers ? sigma : kNotANumber;
      }
      if (rgb != nullptr && column < 3) {
        const float value = field.color_sigmoid ? sigmoid(color[e]) : color[e];
        rgb[3 * sample.i + column] = sample.numbers ? value : kNotANumber;
      }
    }
  }
}

}  // namespace

void pad_networks(const Field& field, const Networks& networks, float* out, cudaStream_t stream) {
  launch("field weights", pad_kernel, 32, 256, 0, stream, field, networks, out);
}

bool field_forward(const Field& field, const float* positions, int64_t n, float* sigmas, float* rgb, Queue queue) {
  const DeviceGuard guard(queue.device);
  const Networks networks = make_networks(field);
  const bool staged = fits_shared(networks), fused = is_fused(staged, n);
  const int64_t slab = fused ? n : std::min(n, slab_samples);
  const Scratch<float> weights(networks.size, queue.stream);
  const Scratch<float> features(fused ? 0 : slab * field.grid.width(), queue.stream);
  pad_networks(field, networks, weights.get(), queue.stream);
  for (int64_t first = 0; first < n; first += slab) {
    const Points points = {positions + 3 * first, std::min(slab, n - first), field.to_unit, 0.5f};
    if (!fused) {
      const Strides strides = level_major(field.grid, points.n);
      encode_levels(field.grid, field.table, points, false, features.get(), strides, queue.stream);
    }
    with_way(networks, queue.tf32, staged, fused, [&](auto width, auto tf32, auto staged, auto fused) {
      launch("field forward", field_forward_kernel<width, tf32, staged, fused>,
             blocks_for(points.n, kThreads / kWarp * kRows, kMostBlocks), kThreads,
             staged ? networks.size * sizeof(float) : 0, queue.stream, field, networks, weights.get(), features.get(),
             points.positions, points.n, sigmas + first, rgb == nullptr ? nullptr : rgb + 3 * first);
    });
  }
  return true;
}

}  // namespace mvdream_fast::cuda
