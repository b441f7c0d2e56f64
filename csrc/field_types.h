// What a field is made of: plain structs that the bindings fill and that every backend reads. Weights are row-major
// [out, in] matrices of bias-free ReLU networks.
#pragma once

#include "hash_grid.h"

namespace mvdream_fast {

constexpr int kMaxLayers = 4;  // 3 hidden layers and the output

struct Mlp {
  int n_layers = 0;  // 0: absent
  int sizes[kMaxLayers + 1] = {};
  const float* weights[kMaxLayers] = {};

  MVDREAM_FAST_HD int n_out() const { return sizes[n_layers]; }
  MVDREAM_FAST_HD int64_t n_weights() const {
    int64_t n = 0;
    for (int i = 0; i < n_layers; ++i) n += int64_t(sizes[i]) * sizes[i + 1];
    return n;
  }
};

enum class DensityActivation { softplus = 0, exp = 1, none = 2 };

struct Field {
  HashGrid grid;
  const float* table = nullptr;
  Mlp density;
  Mlp color;
  float to_unit = 0.5f;  // half of 1 / radius: unit coordinate = position * to_unit + 0.5
  float bias_scale = 0;
  float bias_std = 1;
  DensityActivation activation = DensityActivation::softplus;
  bool color_sigmoid = true;
};

}  // namespace mvdream_fast
