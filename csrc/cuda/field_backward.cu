// The field's backward pass on GPUs, by recomputation: a block takes 16 samples for each of its warps, whose
// activations lie in shared memory because the gradients of the weights are sums over all of them. Every sum of such a
// gradient belongs to one lane of one block and blocks are added in their order, so that only the table's atomics
// depend on the order of the threads. Of many samples the features come level by level from scratch memory, where their
// gradients take their place.
#include <algorithm>

#include "cuda/levels.h"
#include "cuda/networks.cuh"
#include "cuda/ops.h"

namespace mvdream_fast::cuda {
namespace {

constexpr int kMostWarps = 4;
constexpr int kGradientBlocks = 264;  // a fixed number, whatever the GPU: sums of weights are split into as many parts
constexpr int kOutputStride = 24;     // 16 columns, of which the outputs are the first, and 8 against bank conflicts
constexpr float kNotANumber = __builtin_nanf("");

struct Arguments {
  const float* weights;  // padded
  const float* positions;
  int64_t n;
  const float* d_sigmas;
  const float* d_rgb;
  float* d_table;
  float* features;     // [n_levels, n, F] where not fused: read, then overwritten by their gradients
  float* d_positions;  // where not fused the density bias's share only
  float* partials;     // [blocks, networks.size], added to; null if no weight wants its gradient
};

// What a block keeps in shared memory, as offsets in floats; rows are samples.
struct Layout {
  int n_rows, in_stride, hidden_stride, features, d_features, hidden, outputs, weights, sums, total;

  MVDREAM_FAST_HD Layout(const Networks& networks, int n_warps, bool staged, bool with_sums) {
    const int deepest = networks.n_layers[0] > networks.n_layers[1] ? networks.n_layers[0] : networks.n_layers[1];
    n_rows = n_warps * kRows;
    in_stride = networks.n_in + 8;
    hidden_stride = networks.width + 8;
    features = 0;
    d_features = features + n_rows * in_stride;
    hidden = d_features + n_rows * in_stride;
    outputs = hidden + (deepest - 1) * n_rows * hidden_stride;
    weights = outputs + n_rows * kOutputStride;
    sums = weights + (staged ? networks.size : 0);
    total = sums + (staged && with_sums ? networks.size : 0);
  }
};

// d_weights [out, in] += d [samples, out]^T x [samples, in], its 16 x 8 tiles dealt out to the warps of the block.
template <bool kTf32>
__device__ void add_weight_gradient(const float* d, int d_stride, int rows, const float* x, int x_stride, int columns,
                                    int n_samples, float* sums, int stride) {
  const int g = lane_index() / 4, t = lane_index() % 4, across = columns / 8, n_tiles = (rows + 15) / 16 * across;
#pragma unroll 1
  for (int tile = threadIdx.x / kWarp; tile < n_tiles; tile += blockDim.x / kWarp) {
    const int row = tile / across * 16 + g, column = tile % across * 8;
    float c[4] = {};
#pragma unroll 1
    for (int k = t; k < n_samples; k += 8) {
      const float a[4] = {d[k * d_stride + row], d[k * d_stride + row + 8], d[(k + 4) * d_stride + row],
                          d[(k + 4) * d_stride + row + 8]};
      const float b[2] = {x[k * x_stride + column + g], x[(k + 4) * x_stride + column + g]};
      multiply_add<kTf32>(c, factor_of<kTf32>(a), b);
    }
    for (int e = 0; e < 4; ++e) {
      const int r = row + e / 2 * 8;
      if (r < rows) sums[r * stride + column + 2 * t + e % 2] += c[e];
    }
  }
}

// out [N / 8 fragments] = d [W columns] times the matrix: the way back through a layer, to its inputs from `column` on.
template <int W, int N, bool kTf32>
__device__ inline void add_transposed(const Rows<W>& d, const float* weights, int stride, int column, float (*out)[4]) {
  const float* at = weights + column_of_lane() * stride + column + row_of_lane();
#pragma unroll
  for (int k = 0; k < W / 8; ++k) {
    const Factor<4, kTf32> a = as_factor<kTf32>(d.v[k]);
#pragma unroll
    for (int n = 0; n < N / 8; ++n) {
      const float b[2] = {at[8 * k * stride + 8 * n], at[(8 * k + 1) * stride + 8 * n]};
      multiply_add<kTf32>(out[n], a, b);
    }
  }
}

// This lane's fragments of rows in shared memory: element e of fragment n.
__device__ inline int64_t at_fragment(int stride, int n, int e) {
  return (row_of_lane() + e / 2 * 8) * stride + 8 * n + column_of_lane() + e % 2;
}

template <int W>
__device__ inline void store_rows(const Rows<W>& rows, float* out, int stride) {
  for (int n = 0; n < W / 8; ++n) {
    for (int e = 0; e < 4; ++e) out[at_fragment(stride, n, e)] = rows.v[n][e];
  }
}

// Lets a gradient through where the activation was positive.
template <int W>
__device__ inline void mask(Rows<W>* d, const float* activations, int stride) {
  for (int n = 0; n < W / 8; ++n) {
    for (int e = 0; e < 4; ++e) d->v[n][e] = activations[at_fragment(stride, n, e)] > 0 ? d->v[n][e] : 0.0f;
  }
}

// Gradient of the raw output e of this lane.
__device__ inline float d_raw(const Field& field, const Arguments& args, int which, const Sample& sample, int column,
                              float raw) {
  if (!sample.numbers) return 0;
  if (which == 0) {
    if (column != 0 || args.d_sigmas == nullptr) return 0;
    return args.d_sigmas[sample.i] * density_slope(field, biased(field, sample.position, raw));
  }
  if (column >= 3) return 0;
  const float d = args.d_rgb[3 * sample.i + column];
  if (!field.color_sigmoid) return d;
  const float y = sigmoid(raw);
  return d * y * (1.0f - y);
}

// One network forth and back for the block's samples: adds to the sums of its weights and to d_features. Pointers are
// to this warp's rows but in `block`, which is the block's memory. Returns the raw outputs' gradients of this lane.
template <int W, bool kTf32>
__device__ void network(const Field& field, const Networks& networks, const Layout& layout, const Arguments& args,
                        int which, const float* weights, float* block, bool with_sums, float* sums,
                        const Sample (&samples)[2], float* d_out) {
  const Networks::Layer* layers = networks.layers[which];
  const int last = networks.n_layers[which] - 1, warp_row = threadIdx.x / kWarp * kRows;
  const int stride = layout.hidden_stride, per_layer = layout.n_rows * stride;
  const float* x = block + layout.features + warp_row * layout.in_stride;
  float* hidden = block + layout.hidden + warp_row * stride;
  float* outputs = block + layout.outputs + warp_row * kOutputStride;

  Rows<W> rows;
  clear(&rows);
#pragma unroll 1
  for (int n = 0; n < networks.n_in / 8; ++n) {
    float v[4];
    for (int e = 0; e < 4; ++e) v[e] = x[at_fragment(layout.in_stride, n, e)];
    add_product<W, kTf32>(as_factor<kTf32>(v), weights + layers[0].offset + 8 * n, layers[0].stride, rows.v);
  }
  relu(&rows);
  store_rows(rows, hidden, stride);
#pragma unroll 1
  for (int i = 1; i < last; ++i) {
    rows = hidden_layer<W, kTf32>(rows, weights + layers[i].offset, layers[i].stride);
    store_rows(rows, hidden + i * per_layer, stride);
  }
  output_layer<W, kTf32>(rows, weights + layers[last].offset, layers[last].stride, d_out);
  for (int e = 0; e < 4; ++e) {
    d_out[e] = d_raw(field, args, which, samples[e / 2], column_of_lane() + e % 2, d_out[e]);
    outputs[at_fragment(kOutputStride, 0, e)] = d_out[e];
    outputs[at_fragment(kOutputStride, 1, e)] = 0;
  }
  __syncthreads();

  // The last layer has at most three rows: plain multiply-adds, and a tile of mostly zeros for its weights.
  const float* w = weights + layers[last].offset;
  for (int n = 0; n < W / 8; ++n) {
    for (int e = 0; e < 4; ++e) {
      const float* d = outputs + (row_of_lane() + e / 2 * 8) * kOutputStride;
      float sum = 0;
      for (int o = 0; o < 3; ++o) sum += d[o] * w[o * layers[last].stride + 8 * n + column_of_lane() + e % 2];
      rows.v[n][e] = sum;
    }
  }
  if (with_sums) {
    add_weight_gradient<kTf32>(block + layout.outputs, kOutputStride, layers[last].rows,
                               block + layout.hidden + (last - 1) * per_layer, stride, W, layout.n_rows,
                               sums + layers[last].offset, layers[last].stride);
  }
#pragma unroll 1
  for (int i = last - 1; i >= 0; --i) {
    mask(&rows, hidden + i * per_layer, stride);
    __syncthreads();  // every warp has read the activations of layer i
    store_rows(rows, hidden + i * per_layer, stride);
    __syncthreads();
    const float* in = i == 0 ? block + layout.features : block + layout.hidden + (i - 1) * per_layer;
    if (with_sums) {
      add_weight_gradient<kTf32>(block + layout.hidden + i * per_layer, stride, W, in,
                                 i == 0 ? layout.in_stride : stride, i == 0 ? networks.n_in : W, layout.n_rows,
                                 sums + layers[i].offset, layers[i].stride);
    }
    if (i == 0) break;
    Rows<W> back;
    clear(&back);
    add_transposed<W, W, kTf32>(rows, weights + layers[i].offset, layers[i].stride, 0, back.v);
    rows = back;
  }
  float* d_features = block + layout.d_features + warp_row * layout.in_stride;
#pragma unroll 1
  for (int n = 0; n < networks.n_in / 8; ++n) {
    float d[1][4];
    for (int e = 0; e < 4; ++e) d[0][e] = d_features[at_fragment(layout.in_stride, n, e)];
    add_transposed<W, 8, kTf32>(rows, weights + layers[0].offset, layers[0].stride, 8 * n, d);
    for (int e = 0; e < 4; ++e) d_features[at_fragment(layout.in_stride, n, e)] = d[0][e];
  }
  __syncthreads();  // the other network takes the same memory
}

// What a pair of columns of one sample's encoding passes on: to the table, and to d_unit [3].
__device__ inline void pass_on_pair(const Field& field, const Arguments& args, const Sample& sample, int column,
                                    const float* d, float* d_unit) {
  const HashGrid& grid = field.grid;
  for (int f = 0; f < 2; ++f) {
    if (column + f >= grid.width()) return;
    if (grid.n_features > 1 && f == 1) return;
    const GridLevel& level = grid.levels[(column + f) / grid.n_features];
    const Cell cell = locate(level, sample.unit);
    const int64_t first = level.offset * grid.n_features + (column + f) % grid.n_features;
    for (int corner = 0; corner < 8; ++corner) {
      const int64_t at = first + int64_t(cell.index[corner]) * grid.n_features;
      const float weight = corner_weight(cell, corner);
      if (args.d_table != nullptr && grid.n_features > 1) add_pair(args.d_table + at, weight * d[0], weight * d[1]);
      if (args.d_table != nullptr && grid.n_features == 1) atomicAdd(args.d_table + at, weight * d[f]);
      if (args.d_positions == nullptr) continue;
      float dot = field.table[at] * d[f];
      if (grid.n_features > 1) dot += field.table[at + 1] * d[1];
      for (int axis = 0; axis < 3; ++axis) d_unit[axis] += dot * corner_slope(cell, corner, axis) * level.scale;
    }
  }
}

// A lane's pairs of columns of its two samples, 8 apart in its warp's rows `x` of features; their gradients begin at 0.
template <bool kFused>
__device__ inline void load_features(const Field& field, const Networks& networks, const Arguments& args,
                                     const Sample (&samples)[2], int stride, float* x, float* d_x) {
#pragma unroll 1
  for (int n = 0; n < networks.n_in / 8; ++n) {
    const int column = 8 * n + column_of_lane();
#pragma unroll
    for (int s = 0; s < 2; ++s) {
      const int64_t at = at_fragment(stride, n, 2 * s);
      if constexpr (kFused) {
        encode_pair(field.grid, field.table, samples[s].unit, column, x + at);
      } else {
        load_pair(field.grid, args.features, args.n, samples[s].i, column, x + at);
      }
      d_x[at] = d_x[at + 1] = 0;
    }
  }
}

// The bias's share of d_positions and, where fused, the encoding's: d_unit is this lane's, d_density the raw density's
// gradient where t = 0.
template <bool kFused>
__device__ inline void store_d_positions(const Field& field, const Arguments& args, const Sample& sample, float* d_unit,
                                         float d_density) {
  if constexpr (kFused) {
    for (int axis = 0; axis < 3; ++axis) {
      d_unit[axis] += __shfl_xor_sync(kAllLanes, d_unit[axis], 1);
      d_unit[axis] += __shfl_xor_sync(kAllLanes, d_unit[axis], 2);
    }
  }
  if (column_of_lane() != 0 || sample.i >= args.n) return;
  const float* p = sample.position;
  const float norm = sqrtf(p[0] * p[0] + p[1] * p[1] + p[2] * p[2]);
  const float bias = norm > 0 && field.bias_scale != 0 ? -d_density * field.bias_scale / (field.bias_std * norm) : 0.0f;
  for (int axis = 0; axis < 3; ++axis) {
    const float x = fmaf(p[axis], field.to_unit, 0.5f);
    const float d = bias * p[axis] + (x >= 0 && x <= 1 ? d_unit[axis] * field.to_unit : 0.0f);
    args.d_positions[3 * sample.i + axis] = sample.numbers ? d : kNotANumber;
  }
}

// The way back out of the networks for one of the samples: its gradients are in `d`, 8 columns apart.
template <bool kFused>
__device__ inline void pass_on(const Field& field, const Networks& networks, const Arguments& args,
                               const Sample& sample, const float* d, float d_density) {
  float d_unit[3] = {0, 0, 0};
#pragma unroll 1
  for (int n = 0; n < networks.n_in; n += 8) {
    const int column = n + column_of_lane();
    if constexpr (kFused) {
      if (sample.numbers) pass_on_pair(field, args, sample, column, d + n, d_unit);
    } else {
      store_pair(field.grid, d + n, args.n, sample.i, column, args.features);
    }
  }
  if (args.d_positions != nullptr) store_d_positions<kFused>(field, args, sample, d_unit, d_density);
}

template <int W, bool kTf32, bool kStaged, bool kFused>
__global__ void __launch_bounds__(kMostWarps* kWarp, 1)
    field_backward_kernel(const __grid_constant__ Field field, const __grid_constant__ Networks networks,
                          const __grid_constant__ Arguments args) {
  MVDREAM_FAST_DYNAMIC_SHARED(float, block);
  const int n_warps = blockDim.x / kWarp, warp_row = threadIdx.x / kWarp * kRows;
  const Layout layout(networks, n_warps, kStaged, args.partials != nullptr);
  const float* weights = stage_weights<kStaged>(networks, args.weights, block + layout.weights);
  float* partial = args.partials == nullptr ? nullptr : args.partials + int64_t(blockIdx.x) * networks.size;
  float* sums = kStaged ? block + layout.sums : partial;
  const bool with_sums = partial != nullptr;
  if (kStaged && with_sums) {
    for (int i = threadIdx.x; i < networks.size; i += blockDim.x) sums[i] = partial[i];
  }
  float* x = block + layout.features + warp_row * layout.in_stride;
  float* d_x = block + layout.d_features + warp_row * layout.in_stride;
  for (int64_t first = int64_t(blockIdx.x) * layout.n_rows; first < args.n;
       first += int64_t(gridDim.x) * layout.n_rows) {
    Sample samples[2];
    for (int s = 0; s < 2; ++s) {
      const int64_t i = first + warp_row + row_of_lane() + 8 * s;
      samples[s] = make_sample(field, args.positions + 3 * i, i < args.n, i);
    }
    load_features<kFused>(field, networks, args, samples, layout.in_stride, x, d_x);
    float d_density[4], d_color[4];
    network<W, kTf32>(field, networks, layout, args, 0, weights, block, with_sums, sums, samples, d_density);
    if (args.d_rgb != nullptr) {
      network<W, kTf32>(field, networks, layout, args, 1, weights, block, with_sums, sums, samples, d_color);
    }
#pragma unroll
    for (int s = 0; s < 2; ++s) {
      const float* d = d_x + at_fragment(layout.in_stride, 0, 2 * s);
      pass_on<kFused>(field, networks, args, samples[s], d, d_density[2 * s]);
    }
  }
  if (kStaged && with_sums) {
    __syncthreads();
    for (int i = threadIdx.x; i < networks.size; i += blockDim.x) partial[i] = sums[i];
  }
}

// The blocks' parts in their order, in float64; d_density and d_color may be null.
__global__ void add_parts_kernel(const __grid_constant__ Field field, const __grid_constant__ Networks networks,
                                 const float* partials, int64_t n_parts, float* d_density, float* d_color) {
  for (int which = 0; which < 2; ++which) {
    const Mlp& mlp = which == 0 ? field.density : field.color;
    float* out = which == 0 ? d_density : d_color;
    for (int i = 0; out != nullptr && i < networks.n_layers[which]; ++i) {
      const Networks::Layer& layer = networks.layers[which][i];
      const int64_t size = int64_t(mlp.sizes[i + 1]) * mlp.sizes[i];
      for (int64_t at = thread_index(); at < size; at += n_threads()) {
        const int64_t from = layer.offset + at / mlp.sizes[i] * layer.stride + at % mlp.sizes[i];
        double sum = 0;
        for (int64_t part = 0; part < n_parts; ++part) sum += partials[part * networks.size + from];
        out[at] = static_cast<float>(sum);
      }
      out += size;
    }
  }
}

}  // namespace

bool field_backward(const Field& field, const float* positions, int64_t n, const float* d_sigmas, const float* d_rgb,
                    const FieldGradients& gradients, Queue queue) {
  const DeviceGuard guard(queue.device);
  const Networks networks = make_networks(field);
  const HashGrid& grid = field.grid;
  const bool with_sums = gradients.density != nullptr || gradients.color != nullptr;
  const size_t limit = shared_limit();
  int n_warps = kMostWarps;
  const auto bytes = [&](bool staged) { return Layout(networks, n_warps, staged, with_sums).total * sizeof(float); };
  const bool staged = bytes(true) <= limit, fused = is_fused(staged, n) && !queue.deterministic;
  while (n_warps > 1 && bytes(staged) > limit) --n_warps;

  // Fixed point is scaled by the largest of all gradients, so that they all have to be there.
  const int64_t slab = fused || queue.deterministic ? n : std::min(n, slab_samples);
  const int64_t n_blocks = blocks_for(slab, n_warps * kRows, kGradientBlocks);
  const Scratch<float> weights(networks.size, queue.stream);
  const Scratch<float> partials(with_sums ? n_blocks * networks.size : 0, queue.stream);
  const Scratch<float> features(fused ? 0 : slab * grid.width(), queue.stream);
  pad_networks(field, networks, weights.get(), queue.stream);
  if (with_sums) partials.zero(n_blocks * networks.size);
  if (gradients.table != nullptr) {
    const int64_t size = grid.n_entries() * grid.n_features;
    check(cudaMemsetAsync(gradients.table, 0, size * sizeof(float), queue.stream), "field backward");
  }
  for (int64_t first = 0; first < n; first += slab) {
    const Points points = {positions + 3 * first, std::min(slab, n - first), field.to_unit, 0.5f};
    const Strides strides = level_major(grid, points.n);
    if (!fused) encode_levels(grid, field.table, points, false, features.get(), strides, queue.stream);
    float* d_positions = gradients.positions == nullptr ? nullptr : gradients.positions + 3 * first;
    const Arguments args = {weights.get(),
                            points.positions,
                            points.n,
                            d_sigmas == nullptr ? nullptr : d_sigmas + first,
                            d_rgb == nullptr ? nullptr : d_rgb + 3 * first,
                            gradients.table,
                            features.get(),
                            d_positions,
                            partials.get()};
    with_way(networks, queue.tf32, staged, fused, [&](auto width, auto tf32, auto staged, auto fused) {
      launch("field backward", field_backward_kernel<width, tf32, staged, fused>, n_blocks, n_warps * kWarp,
             bytes(staged), queue.stream, field, networks, args);
    });
    if (fused) continue;
    if (gradients.table != nullptr) {
      const auto scatter = queue.deterministic ? scatter_fixed : scatter_levels;
      scatter(grid, points, features.get(), strides, gradients.table, queue.stream);
    }
    if (d_positions != nullptr) {
      pull_positions(grid, field.table, points, features.get(), strides, true, d_positions, queue.stream);
    }
  }
  if (with_sums) {
    launch("field backward", add_parts_kernel, 32, 256, 0, queue.stream, field, networks, partials.get(), n_blocks,
           gradients.density, gradients.color);
  }
  return true;
}

}  // namespace mvdream_fast::cuda
