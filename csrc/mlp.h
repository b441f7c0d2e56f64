// Small bias-free networks on a tile of samples: register-blocked GEMMs of a row-major weight matrix with
// activations stored as [neurons][samples]. Vectors run along the samples, weights are broadcast.
#pragma once

#include "cpu/tiles.h"
#include "field_types.h"
#include "simd.h"

namespace mvdream_fast::MVDREAM_FAST_ISA {

constexpr int kPanel = 3;  // vectors of samples worked on at once: 4 neurons x 3 vectors fill 16 registers
static_assert(kTile % (kPanel * kLanes) == 0, "a tile must be whole panels");

// What becomes of a result: written as it is, through ReLU, where `gate` is positive (ReLU's derivative), or added.
enum class Then { write, relu, gate, add };

template <int J, Then kThen>
MVDREAM_FAST_INLINE void dense_rows(const float* weights, int n_in, const float* in, float* out, const float* gate) {
  VecF sum[J][kPanel];
  for (int j = 0; j < J; ++j) {
    for (int v = 0; v < kPanel; ++v) sum[j][v] = kThen == Then::add ? load(out + j * kTile + v * kLanes) : VecF{};
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
      const int at = j * kTile + v * kLanes;
      if (kThen == Then::relu) sum[j][v] = relu(sum[j][v]);
      if (kThen == Then::gate) sum[j][v] = load(gate + at) > 0.0f ? sum[j][v] : VecF{};
      store(out + at, sum[j][v]);
    }
  }
}

// out [n_out][kTile] = weights [n_out][n_in] * in [n_in][kTile]; `gate`, shaped as `out`, is for Then::gate alone.
template <Then kThen>
void dense(const float* weights, int n_out, int n_in, const float* in, float* out, const float* gate = nullptr) {
  for (int s = 0; s < kTile; s += kPanel * kLanes) {
    int j = 0;
    for (; j + 4 <= n_out; j += 4) {
      const int at = j * kTile + s;
      dense_rows<4, kThen>(weights + j * n_in, n_in, in + s, out + at, kThen == Then::gate ? gate + at : nullptr);
    }
    for (; j < n_out; ++j) {
      const int at = j * kTile + s;
      dense_rows<1, kThen>(weights + j * n_in, n_in, in + s, out + at, kThen == Then::gate ? gate + at : nullptr);
    }
  }
}

// J rows of d_weights, 4 columns each: 12 sums of vectors for J = 3, folded to 4 neighbouring floats a row.
template <int J>
MVDREAM_FAST_INLINE void outer_rows(const float* d_out, const float* in, float* d_weights, int n_in) {
  VecF sum[J][4] = {};
  for (int s = 0; s < kTile; s += kLanes) {
    VecF x[4];
    for (int k = 0; k < 4; ++k) x[k] = load(in + k * kTile + s);
    for (int j = 0; j < J; ++j) {
      const VecF d = load(d_out + j * kTile + s);
      for (int k = 0; k < 4; ++k) sum[j][k] += d * x[k];
    }
  }
  for (int j = 0; j < J; ++j) {
    const VecF sums = sums_of_four(sum[j][0], sum[j][1], sum[j][2], sum[j][3]);
    for (int k = 0; k < 4; ++k) d_weights[j * n_in + k] += sums[k];
  }
}

inline void outer_element(const float* d_out, const float* in, float* d_weight) {
  VecF sum = {};
  for (int s = 0; s < kTile; s += kLanes) sum += load(d_out + s) * load(in + s);
  *d_weight += sums_of_four(sum, sum, sum, sum)[0];
}

template <int J>
MVDREAM_FAST_INLINE void outer_row_block(const float* d_out, int n_in, const float* in, float* d_weights) {
  int k = 0;
  for (; k + 4 <= n_in; k += 4) outer_rows<J>(d_out, in + k * kTile, d_weights + k, n_in);
  for (; k < n_in; ++k) {
    for (int j = 0; j < J; ++j) outer_element(d_out + j * kTile, in + k * kTile, d_weights + j * n_in + k);
  }
}

// d_weights [n_out][n_in] += d_out [n_out][kTile] * in [n_in][kTile]^T; `in` is what stays in the first cache.
inline void dense_d_weights(const float* d_out, int n_out, int n_in, const float* in, float* d_weights) {
  int j = 0;
  for (; j + 3 <= n_out; j += 3) outer_row_block<3>(d_out + j * kTile, n_in, in, d_weights + j * n_in);
  for (; j < n_out; ++j) outer_row_block<1>(d_out + j * kTile, n_in, in, d_weights + j * n_in);
}

// Rows of activations in the scratch memory of one network: its hidden layers, then two for gradients.
inline int64_t mlp_scratch(const Mlp& mlp) { return int64_t(mlp.n_layers + 1) * mlp.sizes[1] * kTile; }

inline float* hidden_rows(const Mlp& mlp, float* scratch, int layer) { return scratch + layer * mlp.sizes[1] * kTile; }

// in [n_in][kTile] -> out [n_out][kTile]; the hidden layers stay in scratch for mlp_backward.
inline void mlp_forward(const Mlp& mlp, const float* in, float* scratch, float* out) {
  const int last = mlp.n_layers - 1;
  for (int i = 0; i < last; ++i) {
    const float* x = i == 0 ? in : hidden_rows(mlp, scratch, i - 1);
    dense<Then::relu>(mlp.weights[i], mlp.sizes[i + 1], mlp.sizes[i], x, hidden_rows(mlp, scratch, i));
  }
  const float* x = hidden_rows(mlp, scratch, last - 1);
  dense<Then::write>(mlp.weights[last], mlp.sizes[last + 1], mlp.sizes[last], x, out);
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
      if (add) {
        dense<Then::add>(transposed, n_in, n_out, d, d_in);
      } else {
        dense<Then::write>(transposed, n_in, n_out, d, d_in);
      }
      return;
    }
    float* d_x = hidden_rows(mlp, scratch, mlp.n_layers - 1 + (i & 1));
    dense<Then::gate>(transposed + first, n_in, n_out, d, d_x, x);
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
