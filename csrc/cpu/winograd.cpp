// Winograd's 3x3 convolution on CPUs: the three linear maps around its matrix products, a vector of channels at a time.
// Source: Lavin and Gray 2015, "Fast Algorithms for Convolutional Neural Networks", section 4. F(4x4, 3x3) at the
// points 0, +-a, +-b and infinity; 5/8 and 3/2 round three times less than the paper's 1 and 2.
#include "cpu/winograd.h"

#include "activations.h"

namespace mvdream_fast {
namespace MVDREAM_FAST_ISA {

namespace {

constexpr int64_t kSerial = 1024;  // numbers of a plane below which a second thread costs more than it saves

constexpr float kA = 0.625f, kB = 1.5f, kA2 = kA * kA, kB2 = kB * kB;

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
  constexpr float kNearScale = 1 / (2 * kA2 * (kA2 - kB2)), kFarScale = 1 / (2 * kB2 * (kB2 - kA2));
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

// Where a tile lies: its image, and the pixel of its output's first corner.
struct Tile {
  int64_t image, row, column;
};

Tile tile_at(const Images& images, int64_t index) {
  const int64_t across = (images.width + 3) / 4, down = (images.height + 3) / 4;
  return {index / (across * down), index / across % down * 4, index % across * 4};
}

// n channels of the 6x6 pixels around a tile's output, zero outside of the image, to the 36 planes of `out`.
MVDREAM_FAST_INLINE void input_tile(const float* x, const Images& images, Tile tile, int64_t c, int64_t n, float* out,
                                    int64_t plane) {
  VecF d[36];
  for (int64_t i = 0; i < 6; ++i)
    for (int64_t j = 0; j < 6; ++j) {
      const int64_t row = tile.row + i - 1, column = tile.column + j - 1;
      const bool inside = row >= 0 && row < images.height && column >= 0 && column < images.width;
      const int64_t pixel = (tile.image * images.height + row) * images.width + column;
      d[6 * i + j] = inside ? load_first(x + pixel * images.n_channels + c, n) : VecF{};
    }
  for (int64_t i = 0; i < 6; ++i) input_map(d + 6 * i, 1);
  for (int64_t j = 0; j < 6; ++j) input_map(d + j, 6);
  for (int64_t i = 0; i < 36; ++i) store_first(out + i * plane + c, d[i], n);
}

// n channels of the 3x3 weights of one output to the 36 planes of `out`.
MVDREAM_FAST_INLINE void weight_tile(const float* weight, int64_t n_channels, float* out, int64_t plane, int64_t n) {
  VecF g[9], half[18], full[36];
  for (int64_t i = 0; i < 9; ++i) g[i] = load_first(weight + i * n_channels, n);
  for (int64_t j = 0; j < 3; ++j) weight_map(g + j, 3, half + j, 3);
  for (int64_t i = 0; i < 6; ++i) weight_map(half + 3 * i, 1, full + 6 * i, 1);
  for (int64_t i = 0; i < 36; ++i) store_first(out + i * plane, full[i], n);
}

MVDREAM_FAST_INLINE void output_tile(const float* products, int64_t plane, const float* bias, const Images& images,
                                     Tile tile, int64_t c, int64_t n, float* y, int64_t stride) {
  VecF m[36], half[24], out[16];
  for (int64_t i = 0; i < 36; ++i) m[i] = load_first(products + i * plane + c, n);
  for (int64_t j = 0; j < 6; ++j) output_map(m + j, 6, half + j, 6);
  for (int64_t i = 0; i < 4; ++i) output_map(half + 6 * i, 1, out + 4 * i, 1);
  const VecF added = bias ? load_first(bias + c, n) : VecF{};
  for (int64_t i = 0; i < 4 && tile.row + i < images.height; ++i)
    for (int64_t j = 0; j < 4 && tile.column + j < images.width; ++j) {
      const int64_t pixel = (tile.image * images.height + tile.row + i) * images.width + tile.column + j;
      store_first(y + pixel * stride + c, out[4 * i + j] + added, n);
    }
}

}  // namespace

void winograd_weights(const float* weight, int64_t n_out, int64_t n_channels, float* out, int n_threads) {
  const int64_t plane = n_out * n_channels;
#pragma omp parallel for schedule(static) num_threads(n_threads) if (plane > kSerial)
  for (int64_t o = 0; o < n_out; ++o) {
    const float* of_row = weight + 9 * o * n_channels;
    int64_t c = 0;
    for (; c + kLanes <= n_channels; c += kLanes)
      weight_tile(of_row + c, n_channels, out + o * n_channels + c, plane, kLanes);
    if (c < n_channels) weight_tile(of_row + c, n_channels, out + o * n_channels + c, plane, n_channels - c);
  }
}

void winograd_input(const float* x, const Images& images, int64_t first, int64_t n_tiles, float* out, int n_threads) {
  const int64_t n_channels = images.n_channels, plane = n_tiles * n_channels;
#pragma omp parallel for schedule(static) num_threads(n_threads) if (plane > kSerial)
  for (int64_t i = 0; i < n_tiles; ++i) {
    const Tile tile = tile_at(images, first + i);
    int64_t c = 0;
    for (; c + kLanes <= n_channels; c += kLanes) input_tile(x, images, tile, c, kLanes, out + i * n_channels, plane);
    if (c < n_channels) input_tile(x, images, tile, c, n_channels - c, out + i * n_channels, plane);
  }
}

void winograd_output(const float* products, const float* bias, const Images& images, int64_t first, int64_t n_tiles,
                     float* y, int64_t stride, int n_threads) {
  const int64_t n_channels = images.n_channels, plane = n_tiles * n_channels;
#pragma omp parallel for schedule(static) num_threads(n_threads) if (plane > kSerial)
  for (int64_t i = 0; i < n_tiles; ++i) {
    const Tile tile = tile_at(images, first + i);
    const float* of_tile = products + i * n_channels;
    int64_t c = 0;
    for (; c + kLanes <= n_channels; c += kLanes) output_tile(of_tile, plane, bias, images, tile, c, kLanes, y, stride);
    if (c < n_channels) output_tile(of_tile, plane, bias, images, tile, c, n_channels - c, y, stride);
  }
}

}  // namespace MVDREAM_FAST_ISA
}  // namespace mvdream_fast
