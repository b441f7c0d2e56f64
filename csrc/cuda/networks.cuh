// The two networks behind the encoding on tensor cores: a warp takes 16 samples, whose activations stay in registers.
//
// A lane's fragment of a result, columns 2 t and 2 t + 1, serves as its fragment of the next GEMM at k = t and t +
// 4: the order of k is free as long as both factors keep it. So no activation is moved between lanes.
#pragma once

#include <type_traits>

#include "cuda/encode.cuh"
#include "cuda/levels.h"
#include "cuda/mma.cuh"
#include "field_types.h"

namespace mvdream_fast::cuda {

constexpr int kRows = 16;  // samples of a warp at a time

// Both networks with hidden layers of one width, padded by zeros: 0 is density, 1 is colour.
struct Networks {
  struct Layer {
    int offset, rows, stride;
  };
  Layer layers[2][kMaxLayers];
  int n_layers[2];
  int n_in;   // padded width of the encoding
  int width;  // of the hidden layers
  int size;   // floats of all
};

constexpr int padded(int n) { return (n + 7) / 8 * 8; }

inline Networks make_networks(const Field& field) {
  Networks networks = {};
  networks.n_in = padded(field.grid.width());
  networks.width = 32;
  for (const Mlp* mlp : {&field.density, &field.color}) {
    if (mlp->n_layers > 0 && mlp->sizes[1] > networks.width) networks.width = mlp->sizes[1];
  }
  for (int which = 0; which < 2; ++which) {
    const Mlp& mlp = which == 0 ? field.density : field.color;
    networks.n_layers[which] = mlp.n_layers;
    for (int i = 0; i < mlp.n_layers; ++i) {
      // 8 floats beyond whole rows keep a warp's loads on different banks.
      const int rows = i + 1 == mlp.n_layers ? 8 : networks.width;
      const int stride = (i == 0 ? networks.n_in : networks.width) + 8;
      networks.layers[which][i] = {networks.size, rows, stride};
      networks.size += rows * stride;
    }
  }
  return networks;
}

__device__ inline int row_of_lane() { return lane_index() / 4; }
__device__ inline int column_of_lane() { return lane_index() % 4 * 2; }

// One of the two samples of a lane, rows g and g + 8 of its warp.
struct Sample {
  int64_t i;
  bool numbers;  // false outside the batch and for a NaN position
  float position[3], unit[3];
};

__device__ inline Sample make_sample(const Field& field, const float* position, bool inside, int64_t i) {
  Sample sample;
  sample.i = i;
  for (int axis = 0; axis < 3; ++axis) sample.position[axis] = inside ? position[axis] : 0.0f;
  sample.numbers = to_unit(sample.position, field.to_unit, 0.5f, sample.unit) && inside;
  return sample;
}

// Columns `column` and `column + 1` (column even) of a sample's encoding, 0 beyond it.
__device__ inline void encode_pair(const HashGrid& grid, const float* table, const float* unit, int column,
                                   float* out) {
  out[0] = out[1] = 0;
  if (column >= grid.width()) return;
  if (grid.n_features == 1) {
    encode<1>(grid.levels[column], table, unit, out);
    if (column + 1 < grid.n_levels) encode<1>(grid.levels[column + 1], table, unit, out + 1);
    return;
  }
  const GridLevel& level = grid.levels[column / grid.n_features];
  const Cell cell = locate(level, unit);
  const float* entries = table + level.offset * grid.n_features + column % grid.n_features;
#pragma unroll
  for (int corner = 0; corner < 8; ++corner) {
    const Entry<2> entry = load_entry<2>(entries + int64_t(cell.index[corner]) * grid.n_features, 0);
    const float weight = corner_weight(cell, corner);
    out[0] += weight * entry.v[0];
    out[1] += weight * entry.v[1];
  }
}

// The same two columns of sample i out of level-major features [n_levels, n, F]; 0 outside. `column` is even.
__device__ inline int64_t feature_at(const HashGrid& grid, int64_t n, int64_t i, int column) {
  return (column / grid.n_features * n + i) * grid.n_features + column % grid.n_features;
}
__device__ inline void load_pair(const HashGrid& grid, const float* features, int64_t n, int64_t i, int column,
                                 float* out) {
  for (int f = 0; f < 2; ++f) {
    out[f] = i < n && column + f < grid.width() ? features[feature_at(grid, n, i, column + f)] : 0.0f;
  }
}

__device__ inline void store_pair(const HashGrid& grid, const float* v, int64_t n, int64_t i, int column,
                                  float* features) {
  for (int f = 0; f < 2; ++f) {
    if (i < n && column + f < grid.width()) features[feature_at(grid, n, i, column + f)] = v[f];
  }
}

// A lane's part of kRows rows and W columns: v[n] is its fragment of columns 8 n to 8 n + 7.
template <int W>
struct Rows {
  float v[W / 8][4];
};

template <int W>
__device__ inline void clear(Rows<W>* rows) {
  for (int n = 0; n < W / 8; ++n) {
    for (int e = 0; e < 4; ++e) rows->v[n][e] = 0;
  }
}

// Keeps NaN, which fmaxf would hide: a diverged run must not pass for an empty scene.
template <int W>
__device__ inline void relu(Rows<W>* rows) {
  for (int n = 0; n < W / 8; ++n) {
    for (int e = 0; e < 4; ++e) rows->v[n][e] = rows->v[n][e] < 0 ? 0.0f : rows->v[n][e];
  }
}

// A result's fragment as a factor's.
template <bool kTf32>
__device__ inline Factor<4, kTf32> as_factor(const float* v) {
  const float a[4] = {v[0], v[2], v[1], v[3]};
  return factor_of<kTf32>(a);
}

// out += 8 columns of activations times the matrix's columns from `weights` on; N / 8 fragments of rows of weights.
template <int N, bool kTf32>
__device__ inline void add_product(const Factor<4, kTf32>& a, const float* weights, int stride, float (*out)[4]) {
  const float* row = weights + row_of_lane() * stride + column_of_lane();
#pragma unroll
  for (int n = 0; n < N / 8; ++n) {
    const Entry<2> b = load_entry<2>(row + 8 * n * stride, 0);
    multiply_add<kTf32>(out[n], a, b.v);
  }
}

template <int W, bool kTf32>
__device__ inline Rows<W> hidden_layer(const Rows<W>& in, const float* weights, int stride) {
  Rows<W> out;
  clear(&out);
#pragma unroll
  for (int k = 0; k < W / 8; ++k) add_product<W, kTf32>(as_factor<kTf32>(in.v[k]), weights + 8 * k, stride, out.v);
  relu(&out);
  return out;
}

// The last layer's outputs of rows g and g + 8 at columns 2 t and 2 t + 1.
template <int W, bool kTf32>
__device__ inline void output_layer(const Rows<W>& in, const float* weights, int stride, float* out) {
  float c[1][4] = {};
#pragma unroll
  for (int k = 0; k < W / 8; ++k) add_product<8, kTf32>(as_factor<kTf32>(in.v[k]), weights + 8 * k, stride, c);
  for (int e = 0; e < 4; ++e) out[e] = c[0][e];
}

// Everything behind the first layer; `hidden` is its output.
template <int W, bool kTf32>
__device__ inline void later_layers(const Networks& networks, int which, const float* weights, Rows<W> hidden,
                                    float* out) {
  const int last = networks.n_layers[which] - 1;
  const Networks::Layer* layers = networks.layers[which];
#pragma unroll 1
  for (int i = 1; i < last; ++i) {
    hidden = hidden_layer<W, kTf32>(hidden, weights + layers[i].offset, layers[i].stride);
  }
  output_layer<W, kTf32>(hidden, weights + layers[last].offset, layers[last].stride, out);
}

__device__ inline float biased(const Field& field, const float* position, float raw) {
  if (field.bias_scale == 0) return raw;
  const float* p = position;
  const float norm = sqrtf(p[0] * p[0] + p[1] * p[1] + p[2] * p[2]);
  return raw + field.bias_scale * (1.0f - norm / field.bias_std);
}

__device__ inline float sigmoid(float x) {
  const float e = expf(-fabsf(x));
  return (x < 0 ? e : 1.0f) / (1.0f + e);
}

__device__ inline float density_of(const Field& field, float raw) {
  if (field.activation == DensityActivation::none) return raw;
  if (field.activation == DensityActivation::exp) return expf(raw);
  return fmaxf(raw, 0.0f) + log1pf(expf(-fabsf(raw)));
}

__device__ inline float density_slope(const Field& field, float raw) {
  if (field.activation == DensityActivation::none) return 1.0f;
  return field.activation == DensityActivation::exp ? expf(raw) : sigmoid(raw);
}

// Raw outputs of a warp's 16 samples, whose features go into both first layers eight columns at a time:
// features(s, column, out) writes columns `column` and `column + 1` of sample s of the lane's two.
template <int W, bool kTf32, typename Features>
__device__ inline void evaluate(const Networks& networks, const float* weights, Features features, float* density,
                                float* color) {
  Rows<W> of_density, of_color;
  clear(&of_density);
  clear(&of_color);
  const bool with_color = networks.n_layers[1] > 0;
#pragma unroll 1
  for (int column = 0; column < networks.n_in; column += 8) {
    float first[2], second[2];
    features(0, column + column_of_lane(), first);
    features(1, column + column_of_lane(), second);
    const float a[4] = {first[0], second[0], first[1], second[1]};
    const Factor<4, kTf32> factor = factor_of<kTf32>(a);
    const Networks::Layer &d = networks.layers[0][0], &c = networks.layers[1][0];
    add_product<W, kTf32>(factor, weights + d.offset + column, d.stride, of_density.v);
    if (with_color) add_product<W, kTf32>(factor, weights + c.offset + column, c.stride, of_color.v);
  }
  relu(&of_density);
  later_layers<W, kTf32>(networks, 0, weights, of_density, density);
  if (!with_color) return;
  relu(&of_color);
  later_layers<W, kTf32>(networks, 1, weights, of_color, color);
}

// The padded networks in this block's shared memory. Those that don't fit stay where they are, in kernels of their own
// (not kStaged): a pointer that may be either costs every load its address space.
template <bool kStaged>
__device__ inline const float* stage_weights(const Networks& networks, const float* weights, float* shared) {
  if constexpr (kStaged) {
    for (int i = threadIdx.x; i < networks.size; i += blockDim.x) shared[i] = weights[i];
    __syncthreads();
    return shared;
  } else {
    return weights;
  }
}

// Whether a block that evaluates the networks has room for them, with another beside it on the same processor.
inline bool fits_shared(const Networks& networks) { return networks.size * sizeof(float) <= shared_limit() / 2; }

// Queues the padding of a field's networks into `out` [networks.size].
void pad_networks(const Field& field, const Networks& networks, float* out, cudaStream_t stream);

// Whether samples are encoded where they are used. Many are encoded level by level, for the sake of the L2 cache, and
// so are all in front of networks that are read from global memory anyway, which saves that kernel an instantiation.
inline bool is_fused(bool staged, int64_t n) { return staged && n < level_major_from; }

// Calls body(width of the hidden layers, tf32, staged, fused) with all four as compile-time constants.
template <typename Body>
void with_way(const Networks& networks, bool tf32, bool staged, bool fused, Body body) {
  const auto with_memory = [&](auto width, auto precision) {
    if (fused) return body(width, precision, std::true_type(), std::true_type());
    if (staged) return body(width, precision, std::true_type(), std::false_type());
    return body(width, precision, std::false_type(), std::false_type());
  };
  const auto with_precision = [&](auto width) {
    if (tf32) return with_memory(width, std::true_type());
    return with_memory(width, std::false_type());
  };
#ifndef MVDREAM_FAST_DEFAULT_WIDTH_ONLY  // what a quick look at the compiler's output sets
  if (networks.width == 32) return with_precision(std::integral_constant<int, 32>());
  if (networks.width == 128) return with_precision(std::integral_constant<int, 128>());
#endif
  return with_precision(std::integral_constant<int, 64>());
}

}  // namespace mvdream_fast::cuda
