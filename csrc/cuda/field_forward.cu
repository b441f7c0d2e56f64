// The field's forward pass on GPUs: no feature and no activation leaves the registers of its warp.
#include "cuda/networks.cuh"
#include "cuda/ops.h"

namespace mvdream_fast::cuda {
namespace {

constexpr int kThreads = 256, kMostBlocks = 1056;  // 8 of the H100's 132 processors' each
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

template <int W, bool kTf32>
__global__ void __launch_bounds__(kThreads, W == 32 ? 2 : 1)
    field_forward_kernel(const __grid_constant__ Field field, const __grid_constant__ Networks networks,
                         const float* padded_weights, bool staged, const float* positions, int64_t n, float* sigmas,
                         float* rgb) {
  MVDREAM_FAST_DYNAMIC_SHARED(float, shared);
  const float* weights = stage_weights(networks, padded_weights, staged ? shared : nullptr);
  for (int64_t first = warp_index() * kRows; first < n; first += n_warps() * kRows) {
    Sample samples[2];
    for (int s = 0; s < 2; ++s) {
      const int64_t i = first + row_of_lane() + 8 * s;
      samples[s] = make_sample(field, positions + 3 * i, i < n, i);
    }
    float density[4], color[4];
    evaluate<W, kTf32>(field, networks, weights, samples, density, color);
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
  const Scratch<float> weights(networks.size, queue.stream);
  pad_networks(field, networks, weights.get(), queue.stream);
  const size_t bytes = networks.size * sizeof(float);
  const bool staged = bytes <= shared_limit() / 2;
  with_width(networks.width, queue.tf32, [&](auto width, auto tf32) {
    launch("field forward", field_forward_kernel<width, tf32>, blocks_for(n, kThreads / kWarp * kRows, kMostBlocks),
           kThreads, staged ? bytes : 0, queue.stream, field, networks, weights.get(), staged, positions, n, sigmas,
           rgb);
  });
  return true;
}

}  // namespace mvdream_fast::cuda
