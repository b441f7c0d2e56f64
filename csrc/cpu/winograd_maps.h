// The maps of Winograd's F(4x4, 3x3) at the points 0, +-a, +-b and infinity, their transposes, and its tiles: shared by
// the convolution and the gradient of its weights. 5/8 and 3/2 round three times less than the usual 1 and 2.
// Source: Lavin and Gray 2015, "Fast Algorithms for Convolutional Neural Networks", section 4.
#pragma once

#include <algorithm>

#include "activations.h"
#include "cpu/winograd.h"

#ifdef _OPENMP
#include <omp.h>
#endif

namespace mvdream_fast::MVDREAM_FAST_ISA {

constexpr int64_t kPlanes = 36;

constexpr float kA = 0.625f, kB = 1.5f, kA2 = kA * kA, kB2 = kB * kB;
constexpr float kNearScale = 1 / (2 * kA2 * (kA2 - kB2)), kFarScale = 1 / (2 * kB2 * (kB2 - kA2));

// B^T d: six numbers of a row or column of the input tile.
MVDREAM_FAST_INLINE void input_map(VecF* d, int64_t step) {
  const VecF d0 = d[0], d1 = d[step], d2 = d[2 * step], d3 = d[3 * step], d4 = d[4 * step], d5 = d[5 * step];
  const VecF even = d4 - kB2 * d2, odd = kA * (d3 - kB2 * d1), even2 = d4 - kA2 * d2, odd2 = kB * (d3 - kA2 * d1);
  d[0] = (d4 - (kA2 + kB2) * d2) + (kA2 * kB2) * d0;
  d[step] = even + odd;
  d[2 * step] = even - odd;
  d[3 * step] = even2 + odd2;
  d[4 * step] = even2 - odd2;
  d[5 * step] = (d5 - (kA2 + kB2) * d3) + (kA2 * kB2) * d1;
}

// G g: three weights to six.
MVDREAM_FAST_INLINE void weight_map(const VecF* g, int64_t step, VecF* out, int64_t out_step) {
  const VecF near = kNearScale * (g[0] + kA2 * g[2 * step]), near_odd = (kNearScale * kA) * g[step];
  const VecF far = kFarScale * (g[0] + kB2 * g[2 * step]), far_odd = (kFarScale * kB) * g[step];
  out[0] = (1 / (kA2 * kB2)) * g[0];
  out[out_step] = near + near_odd;
  out[2 * out_step] = near - near_odd;
  out[3 * out_step] = far + far_odd;
  out[4 * out_step] = far - far_odd;
  out[5 * out_step] = g[2 * step];
}

// A^T m: six numbers to the four of the output.
MVDREAM_FAST_INLINE void output_map(const VecF* m, int64_t step, VecF* out, int64_t out_step) {
  const VecF sum = m[step] + m[2 * step], difference = m[step] - m[2 * step];
  const VecF sum2 = m[3 * step] + m[4 * step], difference2 = m[3 * step] - m[4 * step];
  out[0] = m[0] + sum + sum2;
  out[out_step] = kA * difference + kB * difference2;
  out[2 * out_step] = kA2 * sum + kB2 * sum2;
  out[3 * out_step] = (kA * kA2) * difference + (kB * kB2) * difference2 + m[5 * step];
}

// A m, the transpose of output_map: four gradients of an output to six.
MVDREAM_FAST_INLINE void output_map_transposed(const VecF* d, int64_t step, VecF* out, int64_t out_step) {
  const VecF even = d[0] + kA2 * d[2 * step], odd = kA * (d[step] + kA2 * d[3 * step]);
  const VecF even2 = d[0] + kB2 * d[2 * step], odd2 = kB * (d[step] + kB2 * d[3 * step]);
  out[0] = d[0];
  out[out_step] = even + odd;
  out[2 * out_step] = even - odd;
  out[3 * out_step] = even2 + odd2;
  out[4 * out_step] = even2 - odd2;
  out[5 * out_step] = d[3 * step];
}

// G^T m, the transpose of weight_map: six gradients to those of three weights.
MVDREAM_FAST_INLINE void weight_map_transposed(const VecF* m, int64_t step, VecF* out, int64_t out_step) {
  const VecF near = kNearScale * (m[step] + m[2 * step]), near_odd = (kNearScale * kA) * (m[step] - m[2 * step]);
  const VecF far = kFarScale * (m[3 * step] + m[4 * step]), far_odd = (kFarScale * kB) * (m[3 * step] - m[4 * step]);
  out[0] = (1 / (kA2 * kB2)) * m[0] + near + far;
  out[out_step] = near_odd + far_odd;
  out[2 * out_step] = kA2 * near + kB2 * far + m[5 * step];
}

// A tile: its image, and the pixel of its output's first corner.
struct Tile {
  int64_t image, row, column;
};

static inline Tile tile_at(const Images& images, int64_t index) {
  const int64_t across = (images.width + 3) / 4, down = (images.height + 3) / 4;
  return {index / (across * down), index / across % down * 4, index % across * 4};
}

static inline int64_t pixel_at(const Images& images, int64_t image, int64_t row, int64_t column) {
  return (image * images.height + row) * images.width + column;
}

// n channels of the 6x6 pixels around a tile's output, zero outside of the image, mapped.
MVDREAM_FAST_INLINE void input_tile(const float* x, const Images& images, Tile tile, int64_t c, int64_t n, VecF* d) {
  for (int64_t i = 0; i < 6; ++i)
    for (int64_t j = 0; j < 6; ++j) {
      const int64_t row = tile.row + i - 1, column = tile.column + j - 1;
      const bool inside = row >= 0 && row < images.height && column >= 0 && column < images.width;
      const float* at = x + pixel_at(images, tile.image, row, column) * images.n_channels + c;
      d[6 * i + j] = inside ? load_first(at, n) : VecF{};
    }
  for (int64_t i = 0; i < 6; ++i) input_map(d + 6 * i, 1);
  for (int64_t j = 0; j < 6; ++j) input_map(d + j, 6);
}

static inline int thread_number() {
#ifdef _OPENMP
  return omp_get_thread_num();
#else
  return 0;
#endif
}

}  // namespace mvdream_fast::MVDREAM_FAST_ISA
