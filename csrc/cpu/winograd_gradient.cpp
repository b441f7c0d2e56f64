// The gradient of a 3x3 convolution's weights by Winograd's algorithm: G^T [(A dY A^T) (B^T x B)] G, summed over tiles
// before the last map, as 36 GEMMs of [outputs, tiles] and [tiles, inputs]. A thread takes a block of outputs and
// inputs; the order of its sums over tiles is fixed: any number of threads gives the same bits.
#include <memory>

#include "cpu/winograd_maps.h"

namespace mvdream_fast {
namespace MVDREAM_FAST_ISA {

namespace {

constexpr int64_t kOutputs = 24, kInputs = 96;    // of a block: its 36 sums fit into 512 KB
constexpr int64_t kMostTiles = int64_t(4) << 20;  // transformed numbers that are alive at a time
constexpr int64_t kLine = 16;                     // floats of a cache line

// Transformed tiles [36, tiles, stride]: rows an odd number of cache lines long fall into different sets of the cache.
struct Planes {
  int64_t n_channels, n_tiles;
  float* data;

  static int64_t stride_of(int64_t n_channels) { return ((n_channels + kLine - 1) / kLine | 1) * kLine; }
  int64_t stride() const { return stride_of(n_channels); }
  float* row(int64_t plane, int64_t tile) const { return data + (plane * n_tiles + tile) * stride(); }
};

// Stores 36 vectors of a tile; a short vector is followed by zeros, so that GEMMs may read whole ones.
MVDREAM_FAST_INLINE void store_tile(const Planes& planes, int64_t tile, int64_t c, const VecF* of) {
  for (int64_t p = 0; p < kPlanes; ++p) store(planes.row(p, tile) + c, of[p]);
}

MVDREAM_FAST_INLINE void transform_input(const float* x, const Images& images, Tile at, const Planes& planes,
                                         int64_t tile, int64_t c, int64_t n) {
  VecF d[kPlanes];
  input_tile(x, images, at, c, n, d);
  store_tile(planes, tile, c, d);
}

// n channels of the gradients of a tile's 4x4 outputs, mapped; those outside of the image are zero.
MVDREAM_FAST_INLINE void transform_gradient(const float* d_y, const Images& images, Tile at, const Planes& planes,
                                            int64_t tile, int64_t o, int64_t n) {
  VecF d[16], half[24], full[kPlanes];
  for (int64_t i = 0; i < 4; ++i)
    for (int64_t j = 0; j < 4; ++j) {
      const bool inside = at.row + i < images.height && at.column + j < images.width;
      const float* from = d_y + pixel_at(images, at.image, at.row + i, at.column + j) * planes.n_channels + o;
      d[4 * i + j] = inside ? load_first(from, n) : VecF{};
    }
  for (int64_t j = 0; j < 4; ++j) output_map_transposed(d + j, 4, half + j, 4);
  for (int64_t i = 0; i < 6; ++i) output_map_transposed(half + 4 * i, 1, full + 6 * i, 1);
  store_tile(planes, tile, o, full);
}

// sums [rows, vectors of inputs], over all tiles
template <int64_t kRows, int64_t kVectors>
MVDREAM_FAST_INLINE void multiply(const float* d, int64_t d_stride, const float* x, int64_t x_stride, int64_t n_tiles,
                                  float* sums) {
  VecF sum[kRows][kVectors] = {};
  for (int64_t t = 0; t < n_tiles; ++t) {
    VecF of_x[kVectors];
    for (int64_t v = 0; v < kVectors; ++v) of_x[v] = load(x + t * x_stride + v * kLanes);
    for (int64_t r = 0; r < kRows; ++r)
      for (int64_t v = 0; v < kVectors; ++v) sum[r][v] += d[t * d_stride + r] * of_x[v];
  }
  for (int64_t r = 0; r < kRows; ++r)
    for (int64_t v = 0; v < kVectors; ++v) store(sums + r * kInputs + v * kLanes, sum[r][v]);
}

template <int64_t kVectors>
void multiply_rows(int64_t rows, const float* d, int64_t d_stride, const float* x, int64_t x_stride, int64_t n_tiles,
                   float* sums) {
  int64_t r = 0;
  for (; r + 6 <= rows; r += 6) multiply<6, kVectors>(d + r, d_stride, x, x_stride, n_tiles, sums + r * kInputs);
  for (; r + 2 <= rows; r += 2) multiply<2, kVectors>(d + r, d_stride, x, x_stride, n_tiles, sums + r * kInputs);
  for (; r < rows; ++r) multiply<1, kVectors>(d + r, d_stride, x, x_stride, n_tiles, sums + r * kInputs);
}

// The 36 sums of a block mapped to 3x3 gradients, n inputs of one output: d_weight [9, n_channels] from c on.
MVDREAM_FAST_INLINE void transform_sums(const float* sums, int64_t plane, int64_t n, float* d_weight,
                                        int64_t n_channels, bool add) {
  VecF m[kPlanes], half[18], g[9];
  for (int64_t p = 0; p < kPlanes; ++p) m[p] = load(sums + p * plane);
  for (int64_t j = 0; j < 6; ++j) weight_map_transposed(m + j, 6, half + j, 6);
  for (int64_t i = 0; i < 3; ++i) weight_map_transposed(half + 6 * i, 1, g + 3 * i, 1);
  for (int64_t i = 0; i < 9; ++i) {
    float* at = d_weight + i * n_channels;
    store_first(at, add ? load_first(at, n) + g[i] : g[i], n);
  }
}

// Outputs [o, o + rows) and inputs [c, c + n) of the gradient. sums: [36, kOutputs, kInputs].
void block_gradient(const Planes& d, const Planes& x, int64_t o, int64_t rows, int64_t c, int64_t n, float* sums,
                    float* d_weight, bool add) {
  constexpr int64_t kPlane = kOutputs * kInputs;
  for (int64_t p = 0; p < kPlanes; ++p)
    for (int64_t i = 0; i < n; i += 2 * kLanes)
      (n - i > kLanes ? multiply_rows<2> : multiply_rows<1>)(rows, d.row(p, 0) + o, d.stride(), x.row(p, 0) + c + i,
                                                             x.stride(), x.n_tiles, sums + p * kPlane + i);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t i = 0; i < n; i += kLanes)
      transform_sums(sums + r * kInputs + i, kPlane, std::min<int64_t>(kLanes, n - i),
                     d_weight + (o + r) * 9 * x.n_channels + c + i, x.n_channels, add);
}

std::unique_ptr<float[]> floats(int64_t n) { return std::unique_ptr<float[]>(new float[n]); }

}  // namespace

void winograd_conv3x3_weights(const float* x, const Images& images, const float* d_y, int64_t n_out, float* d_weight,
                              int n_threads) {
  const int64_t n_channels = images.n_channels;
  const int64_t n_tiles = images.n_images * ((images.height + 3) / 4) * ((images.width + 3) / 4);
  const int64_t x_size = kPlanes * Planes::stride_of(n_channels), d_size = kPlanes * Planes::stride_of(n_out);
  const int64_t chunk = std::clamp<int64_t>(kMostTiles / (x_size + d_size), 1, n_tiles);
  const auto of_x = floats(chunk * x_size), of_d = floats(chunk * d_size);
  const auto scratch = floats(n_threads * kPlanes * kOutputs * kInputs);
  const int64_t n_blocks = (n_out + kOutputs - 1) / kOutputs, n_pieces = (n_channels + kInputs - 1) / kInputs;
#pragma omp parallel num_threads(n_threads)
  for (int64_t first = 0; first < n_tiles; first += chunk) {
    const int64_t n = std::min(chunk, n_tiles - first);
    const Planes planes{n_channels, n, of_x.get()}, gradients{n_out, n, of_d.get()};
#pragma omp for schedule(static)
    for (int64_t tile = 0; tile < n; ++tile) {
      const Tile at = tile_at(images, first + tile);
      int64_t c = 0;
      for (; c + kLanes <= n_channels; c += kLanes) transform_input(x, images, at, planes, tile, c, kLanes);
      if (c < n_channels) transform_input(x, images, at, planes, tile, c, n_channels - c);
      int64_t o = 0;
      for (; o + kLanes <= n_out; o += kLanes) transform_gradient(d_y, images, at, gradients, tile, o, kLanes);
      if (o < n_out) transform_gradient(d_y, images, at, gradients, tile, o, n_out - o);
    }
    float* sums = scratch.get() + thread_number() * kPlanes * kOutputs * kInputs;
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < n_blocks * n_pieces; ++task) {
      const int64_t o = task / n_pieces * kOutputs, c = task % n_pieces * kInputs;
      block_gradient(gradients, planes, o, std::min(kOutputs, n_out - o), c, std::min(kInputs, n_channels - c), sums,
                     d_weight, first > 0);
    }
  }
}

void turn_weights(const float* weight, int64_t n_out, int64_t n_channels, float* out, int n_threads) {
#pragma omp parallel for schedule(static) num_threads(n_threads)
  for (int64_t c = 0; c < n_channels; c += kLine)
    for (int64_t tap = 0; tap < 9; ++tap)
      for (int64_t o = 0; o < n_out; o += kLine)
        for (int64_t i = c; i < std::min(c + kLine, n_channels); ++i)
          for (int64_t j = o; j < std::min(o + kLine, n_out); ++j)
            out[(9 * i + 8 - tap) * n_out + j] = weight[(9 * j + tap) * n_channels + i];
}

}  // namespace MVDREAM_FAST_ISA
}  // namespace mvdream_fast
