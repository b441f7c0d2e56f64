// Small bias-free networks on a tile of samples: register-blocked products of a row-major weight matrix with
// activations stored as [neurons][samples]. Vectors run along the samples, weights are broadcast.
#pragma once

#include "cpu/tiles.h"
#include "field_types.h"
#include "simd.h"

namespace mvdream_fast::MVDREAM_FAST_ISA {

constexpr int kPanel = 3;  // vectors of samples worked on at once: 4 neurons x 3 vectors fill 16 registers
static_assert(kTile % (kPanel * kLanes) == 0, "a tile must be whole panels");

template <int J>
MVDREAM_FAST_INLINE void dense_rows(const float* weights, int n_in, const float* in, float* out, bool relu, bool add) {
  VecF sum[J][kPanel];
  for (int j = 0; j < J; ++j) {
    for (int v = 0; v < kPanel; ++v) sum[j][v] = add ? load(out + j * kTile + v * kLanes) : VecF{};
  }
  for (int k = 0; k < n_in; ++k) {
    VecF x[kPanel];
    for (int v = 0; v < kPanel; ++v) x[v] = load(in + k * kTile + v * kLanes);
    for (int j = 0; j < J; ++j) {
      const float w = weights[j * n_in + k];
      for (int v = 0; v < kPanel; ++v) sum[j][v] += w * x[v];
    }
  }
  for (int j = 0; j < J; ++j) {
    for (int v = 0; v < kPanel; ++v) {
      store(out + j * kTile + v * kLanes, relu ? max(sum[j][v], splat(0.0f)) : sum[j][v]);
    }
  }
}

// out [n_out][kTile] = weights [n_out][n_in] * in [n_in][kTile], through ReLU or added to what `out` holds.
inline void dense(const float* weights, int n_out, int n_in, const float* in, float* out, bool relu, bool add) {
  for (int s = 0; s < kTile; s += kPanel * kLanes) {
    int j = 0;
    for (; j + 4 <= n_out; j += 4) {
      dense_rows<4>(weights + j * n_in, n_in, in + s, out + j * kTile + s, relu, add);
    }
    for (; j < n_out; ++j) dense_rows<1>(weights + j * n_in, n_in, in + s, out + j * kTile + s, relu, add);
  }
}

template <int J, int K>
MVDREAM_FAST_INLINE void outer_rows(const float* d_out, const float* in, float* d_weights, int n_in) {
  VecF sum[J][K] = {};
  for (int s = 0; s < kTile; s += kLanes) {
    VecF x[K];
    for (int k = 0; k < K; ++k) x[k] = load(in + k * kTile + s);
    for (int j = 0; j < J; ++j) {
      const VecF d = load(d_out + j * kTile + s);
      for (int k = 0; k < K; ++k) sum[j][k] += d * x[k];
    }
  }
  for (int j = 0; j < J; ++j) {
    for (int k = 0; k < K; ++k) d_weights[j * n_in + k] += mvdream_fast::MVDREAM_FAST_ISA::sum(sum[j][k]);
  }
}

template <int J>
MVDREAM_FAST_INLINE void outer_row_blocks(const float* d_out, int n_in, const float* in, float* d_weights) {
  int k = 0;
  for (; k + 3 <= n_in; k += 3) outer_rows<J, 3>(d_out, in + k * kTile, d_weights + k, n_in);
  for (; k < n_in; ++k) outer_rows<J, 1>(d_out, in + k * kTile, d_weights + k, n_in);
}

// d_weights [n_out][n_in] += d_out [n_out][kTile] * in [n_in][kTile]^T.
inline void dense_d_weights(const float* d_out, int n_out, int n_in, const float* in, float* d_weights) {
  int j = 0;
  for (; j + 4 <= n_out; j += 4) outer_row_blocks<4>(d_out + j * kTile, n_in, in, d_weights + j * n_in);
  for (; j < n_out; ++j) outer_row_blocks<1>(d_out + j * kTile, n_in, in, d_weights + j * n_in);
}

// Rows of activations in the scratch memory of one network: its hidden layers, then two for gradients.
inline int64_t mlp_scratch(const Mlp& mlp) { return int64_t(mlp.n_layers + 1) * mlp.sizes[1] * kTile; }

inline float* hidden_rows(const Mlp& mlp, float* scratch, int layer) { return scratch + layer * mlp.sizes[1] * kTile; }

// in [n_in][kTile] -> out [n_out][kTile]; the hidden layers stay in scratch for mlp_backward.
inline void mlp_forward(const Mlp& mlp, const float* in, float* scratch, float* out) {
  for (int i = 0; i < mlp.n_layers; ++i) {
    const bool last = i == mlp.n_layers - 1;
    const float* x = i == 0 ? in : hidden_rows(mlp, scratch, i - 1);
    dense(mlp.weights[i], mlp.sizes[i + 1], mlp.sizes[i], x, last ? out : hidden_rows(mlp, scratch, i), !last, false);
  }
}

// d_out [n_out][kTile] -> d_weights (all layers in order, added to) and d_in [n_in][kTile] (written, or added to).
// `transposed` holds every layer's matrix as [in][out], in order; scratch as mlp_forward left it.
inline void mlp_backward(const Mlp& mlp, const float* transposed, const float* in, const float* d_out, float* scratch,
                         float* d_weights, float* d_in, bool add) {
  int64_t first = mlp.n_weights();
  const float* d = d_out;
  for (int i = mlp.n_layers - 1; i >= 0; --i) {
    const int n_in = mlp.sizes[i], n_out = mlp.sizes[i + 1];
    first -= int64_t(n_in) * n_out;
    const float* x = i == 0 ? in : hidden_rows(mlp, scratch, i - 1);
    if (d_weights != nullptr) dense_d_weights(d, n_out, n_in, x, d_weights + first);
    if (i == 0) {
      dense(transposed, n_in, n_out, d, d_in, false, add);
      return;
    }
    float* d_x = hidden_rows(mlp, scratch, mlp.n_layers - 1 + (i & 1));
    dense(transposed + first, n_in, n_out, d, d_x, false, false);
    for (int s = 0; s < n_in * kTile; s += kLanes) {
      store(d_x + s, load(x + s) > 0.0f ? load(d_x + s) : VecF{});
    }
    d = d_x;
  }
}

// Every layer's matrix transposed, in order.
inline void transpose_weights(const Mlp& mlp, float* transposed) {
  for (int i = 0; i < mlp.n_layers; ++i) {
    for (int k = 0; k < mlp.sizes[i]; ++k) {
      for (int j = 0; j < mlp.sizes[i + 1]; ++j) *transposed++ = mlp.weights[i][j * mlp.sizes[i] + k];
    }
  }
}

}  // namespace mvdream_fast::MVDREAM_FAST_ISA
