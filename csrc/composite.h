// Compositing along one ray and its adjoint, in the order of its samples.
//
//   x_i = sigma_i (t_end_i - t_start_i),  alpha_i = 1 - exp(-x_i),  T_{i+1} = T_i (1 - alpha_i),  w_i = T_i alpha_i
//   dL/dx_i = g_i T_{i+1} - sum_{j>i} g_j w_j,  g_i = dL/dw_i
#pragma once

#include <cmath>

#include "hd.h"

namespace mvdream_fast {
namespace MVDREAM_FAST_ISA {

// 1 - exp(-x) for x >= 0, to a few units in the last place also for small x, where it is about x. Branchless, so that a
// loop over it vectorises. exp(-x) = 2^n e^r with |r| <= ln(2)/2; then 1 - exp(-x) = (1 - 2^n) - 2^n (e^r - 1).
MVDREAM_FAST_HD float alpha_of(float x) {
  x = x > 87.0f ? 87.0f : x;  // exp(-87) is still a normal number; beyond it alpha is 1. NaN stays NaN
  x = x < -87.0f ? -87.0f : x;
  const float scaled = x * -1.44269504f;
  const int n = static_cast<int>(x == x ? scaled - 0.5f : 0.0f);  // a NaN has no integer
  const float nf = static_cast<float>(n);
  const float r = (-x - nf * 0.693359375f) - nf * -2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  const float expm1_r = p * r * r + r;
  union {
    uint32_t u;
    float f;
  } two_n;
  two_n.u = static_cast<uint32_t>(n + 127) << 23;
  return (1.0f - two_n.f) - two_n.f * expm1_r;
}

// Sums of one ray so far.
struct RaySums {
  double transmittance = 1, rgb[3] = {0, 0, 0}, opacity = 0, depth = 0, second_moment = 0;
};

// Adds one sample; returns its weight.
MVDREAM_FAST_HD float add_sample(RaySums* sums, float alpha, const float* rgb, float t) {
  const double w = sums->transmittance * alpha;
  for (int c = 0; c < 3; ++c) sums->rgb[c] += w * rgb[c];
  sums->opacity += w;
  sums->depth += w * t;
  sums->second_moment += w * (static_cast<double>(t) * t);
  sums->transmittance *= 1.0 - alpha;
  return static_cast<float>(w);
}

// sum w (t - depth)^2 with depth = sum w t, which is not divided by the opacity.
MVDREAM_FAST_HD double z_variance_of(const RaySums& sums) {
  const double v = sums.second_moment - sums.depth * sums.depth * (2.0 - sums.opacity);
  return v > 0 ? v : 0;
}

// Cotangents of one ray's outputs, and what its forward pass left.
struct RayAdjoint {
  double d_rgb[3], d_opacity, d_depth, d_z_variance, background[3], opacity, depth;
};

// dL/dw of a sample at t with this colour.
MVDREAM_FAST_HD double weight_cotangent(const RayAdjoint& ray, const float* rgb, float t, float d_weight) {
  double g = static_cast<double>(d_weight) + ray.d_opacity + ray.d_depth * t;
  for (int c = 0; c < 3; ++c) g += ray.d_rgb[c] * (rgb[c] - ray.background[c]);
  const double off = t - ray.depth;
  return g + ray.d_z_variance * (off * off - 2.0 * ray.depth * (1.0 - ray.opacity) * t);
}

}  // namespace MVDREAM_FAST_ISA
}  // namespace mvdream_fast
