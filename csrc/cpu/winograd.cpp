// Winograd's 3x3 convolution on CPUs, for chunks of tiles: the input's transform is shared by all threads; each then
// takes a block of outputs, transforms its weights into the second-level cache, multiplies, and transforms the products
// back. Weights are transformed anew for every chunk, which costs less than fetching transformed ones, four times as
// large. Sums have a fixed order: any number of threads gives the same bits. Source: winograd_maps.h.
#include "cpu/winograd.h"

#include <memory>

#include "cpu/winograd_maps.h"

namespace mvdream_fast {
namespace MVDREAM_FAST_ISA {

namespace {

constexpr int64_t kOutputs = 16;                  // of a block: with kInputs and kChunk, what fits into 512 KB
constexpr int64_t kInputs = 96;                   // channels of the weights that are transformed at a time
constexpr int64_t kChunk = 64;                    // tiles
constexpr int64_t kMostInput = int64_t(4) << 20;  // numbers of transformed input that are alive at a time
constexpr int64_t kSerial = 32768;  // multiplications of a plane below which threads cost more than they save
// Planes a power of two apart would fall into the same few sets of the cache.
constexpr int64_t kInputPad = 128, kProductPad = 16;

// Tiles first..first + n_tiles of all, those of one image in rows. Their transformed input is [36, panels, C, tiles of
// a panel]: panels of two vectors of tiles, the last perhaps of one, so that a product reads its input in order.
struct Chunk {
  const Images& images;
  int64_t first, n_tiles;
  float* input;

  int64_t n_vectors() const { return (n_tiles + kLanes - 1) / kLanes; }
  int64_t plane() const { return n_vectors() * kLanes * images.n_channels + kInputPad; }
  // Vectors of the panel that starts with an even vector.
  int64_t panel_vectors(int64_t vector) const { return std::min<int64_t>(2, n_vectors() - vector); }
  float* panel(int64_t vector) const { return input + vector * kLanes * images.n_channels; }
};

// n channels of a vector of tiles; those behind the chunk's last are zero.
MVDREAM_FAST_INLINE void transform_input(const Chunk& chunk, const float* x, int64_t vector, int64_t c, int64_t n) {
  const int64_t width = chunk.panel_vectors(vector / 2 * 2) * kLanes, plane = chunk.plane();
  float* rows = chunk.panel(vector / 2 * 2) + c * width + vector % 2 * kLanes;
  for (int64_t first = 0; first < kLanes; first += 4) {
    VecF d[4][kPlanes] = {};
    for (int64_t i = 0; i < 4; ++i) {
      const int64_t tile = vector * kLanes + first + i;
      if (tile < chunk.n_tiles) input_tile(x, chunk.images, tile_at(chunk.images, chunk.first + tile), c, n, d[i]);
    }
    for (int64_t p = 0; p < kPlanes; ++p)
      transposed(d[0][p], d[1][p], d[2][p], d[3][p], [&](int64_t channel, const float* four) {
        if (channel < n) std::memcpy(rows + p * plane + channel * width + first, four, 4 * sizeof(float));
      });
  }
}

// n channels of the 3x3 weights of one output, mapped.
MVDREAM_FAST_INLINE void weight_tile(const float* weight, int64_t n_channels, int64_t n, float* out, int64_t plane) {
  VecF g[9], half[18], full[kPlanes];
  for (int64_t i = 0; i < 9; ++i) g[i] = load_first(weight + i * n_channels, n);
  for (int64_t j = 0; j < 3; ++j) weight_map(g + j, 3, half + j, 3);
  for (int64_t i = 0; i < 6; ++i) weight_map(half + 3 * i, 1, full + 6 * i, 1);
  for (int64_t p = 0; p < kPlanes; ++p) store_first(out + p * plane, full[p], n);
}

// m [rows, vectors of tiles] (+)= w [rows, n] x [n, vectors]
template <int64_t kRows, int64_t kVectors>
MVDREAM_FAST_INLINE void multiply(const float* w, const float* x, int64_t n, float* m, int64_t m_stride, bool add) {
  VecF sum[kRows][kVectors] = {};
  for (int64_t k = 0; k < n; ++k) {
    VecF of_x[kVectors];
    for (int64_t v = 0; v < kVectors; ++v) of_x[v] = load(x + (k * kVectors + v) * kLanes);
    for (int64_t r = 0; r < kRows; ++r)  // in this order, one register is enough for w
      for (int64_t v = 0; v < kVectors; ++v) sum[r][v] += w[r * kInputs + k] * of_x[v];
  }
  for (int64_t r = 0; r < kRows; ++r)
    for (int64_t v = 0; v < kVectors; ++v) {
      float* at = m + r * m_stride + v * kLanes;
      store(at, add ? load(at) + sum[r][v] : sum[r][v]);
    }
}

template <int64_t kVectors>
void multiply_rows(int64_t rows, const float* w, const float* x, int64_t n, float* m, int64_t m_stride, bool add) {
  int64_t r = 0;
  for (; r + 6 <= rows; r += 6) multiply<6, kVectors>(w + r * kInputs, x, n, m + r * m_stride, m_stride, add);
  for (; r + 4 <= rows; r += 4) multiply<4, kVectors>(w + r * kInputs, x, n, m + r * m_stride, m_stride, add);
  for (; r < rows; ++r) multiply<1, kVectors>(w + r * kInputs, x, n, m + r * m_stride, m_stride, add);
}

// What one thread works on: transformed weights [36, kOutputs, kInputs] and products [36, kOutputs, kChunk].
struct Scratch {
  static constexpr int64_t kWeightPlane = kOutputs * kInputs + kProductPad;
  static constexpr int64_t kProductPlane = kOutputs * kChunk + kProductPad;
  static constexpr int64_t kSize = kPlanes * (kWeightPlane + kProductPlane);
  float* weights;
  float* products;
};

// The products of a chunk with outputs [o, o + rows).
void multiply_block(const Chunk& chunk, const float* weight, int64_t rows, Scratch scratch) {
  const int64_t n_channels = chunk.images.n_channels;
  for (int64_t start = 0; start < n_channels; start += kInputs) {
    const int64_t n = std::min(kInputs, n_channels - start);
    for (int64_t r = 0; r < rows; ++r) {
      const float* of_row = weight + 9 * r * n_channels + start;
      float* to = scratch.weights + r * kInputs;
      int64_t c = 0;
      for (; c + kLanes <= n; c += kLanes) weight_tile(of_row + c, n_channels, kLanes, to + c, Scratch::kWeightPlane);
      if (c < n) weight_tile(of_row + c, n_channels, n - c, to + c, Scratch::kWeightPlane);
    }
    for (int64_t p = 0; p < kPlanes; ++p)
      for (int64_t vector = 0; vector < chunk.n_vectors(); vector += 2) {
        const int64_t n_vectors = chunk.panel_vectors(vector);
        const float* x = chunk.panel(vector) + p * chunk.plane() + start * n_vectors * kLanes;
        float* m = scratch.products + p * Scratch::kProductPlane + vector * kLanes;
        const float* w = scratch.weights + p * Scratch::kWeightPlane;
        (n_vectors == 2 ? multiply_rows<2> : multiply_rows<1>)(rows, w, x, n, m, kChunk, start > 0);
      }
  }
}

// The pixels of a vector of tiles, for up to four outputs from o on.
void transform_output(const Chunk& chunk, const float* products, int64_t vector, const float* bias, int64_t n_rows,
                      int64_t stride, float* y) {
  VecF out[4][16] = {};
  for (int64_t r = 0; r < n_rows; ++r) {
    VecF m[kPlanes], half[24];
    for (int64_t p = 0; p < kPlanes; ++p)
      m[p] = load(products + p * Scratch::kProductPlane + r * kChunk + vector * kLanes);
    for (int64_t j = 0; j < 6; ++j) output_map(m + j, 6, half + j, 6);
    for (int64_t i = 0; i < 4; ++i) output_map(half + 6 * i, 1, out[r] + 4 * i, 1);
    if (bias)
      for (int64_t i = 0; i < 16; ++i) out[r][i] += bias[r];
  }
  const Images& images = chunk.images;
  Tile tiles[kLanes];
  const int64_t n_tiles = std::min<int64_t>(kLanes, chunk.n_tiles - vector * kLanes);
  for (int64_t i = 0; i < n_tiles; ++i) tiles[i] = tile_at(images, chunk.first + vector * kLanes + i);
  for (int64_t i = 0; i < 16; ++i)
    transposed(out[0][i], out[1][i], out[2][i], out[3][i], [&](int64_t index, const float* four) {
      if (index >= n_tiles) return;
      const int64_t row = tiles[index].row + i / 4, column = tiles[index].column + i % 4;
      if (row >= images.height || column >= images.width) return;
      float* at = y + pixel_at(images, tiles[index].image, row, column) * stride;
      std::memcpy(at, four, n_rows * sizeof(float));
    });
}

std::unique_ptr<float[]> floats(int64_t n) { return std::unique_ptr<float[]>(new float[n]); }

}  // namespace

void winograd_conv3x3(const float* x, const Images& images, const float* weight, const float* bias, int64_t n_out,
                      float* y, int n_threads) {
  const int64_t n_channels = images.n_channels, n_blocks = (n_out + kOutputs - 1) / kOutputs;
  const int64_t n_tiles = images.n_images * ((images.height + 3) / 4) * ((images.width + 3) / 4);
  const int64_t n_chunks = (n_tiles + kChunk - 1) / kChunk, n_pieces = (n_channels + kLanes - 1) / kLanes;
  const int64_t chunk_size = kPlanes * (kChunk * n_channels + kInputPad);
  // As many chunks at once as give every thread a few blocks.
  const int64_t wanted = (4 * n_threads + n_blocks - 1) / n_blocks;
  const int64_t at_once = std::max<int64_t>(1, std::min({n_chunks, wanted, kMostInput / chunk_size}));
  const auto input = floats(at_once * chunk_size), scratch = floats(n_threads * Scratch::kSize);
  const auto chunk_at = [&](int64_t first, int64_t i) {
    const int64_t tile = (first + i) * kChunk;
    return Chunk{images, tile, std::min(kChunk, n_tiles - tile), input.get() + i * chunk_size};
  };
#pragma omp parallel num_threads(n_threads) if (n_tiles * n_channels * n_out > kSerial)
  for (int64_t first = 0; first < n_chunks; first += at_once) {
    const int64_t n = std::min(at_once, n_chunks - first), most_vectors = kChunk / kLanes;
#pragma omp for schedule(static)
    for (int64_t task = 0; task < n * most_vectors * n_pieces; ++task) {
      const Chunk chunk = chunk_at(first, task / n_pieces / most_vectors);
      const int64_t vector = task / n_pieces % most_vectors, c = task % n_pieces * kLanes;
      if (vector >= chunk.n_vectors()) continue;
      if (c + kLanes <= n_channels)
        transform_input(chunk, x, vector, c, kLanes);
      else
        transform_input(chunk, x, vector, c, n_channels - c);
    }
    float* mine = scratch.get() + thread_number() * Scratch::kSize;
    const Scratch work{mine, mine + kPlanes * Scratch::kWeightPlane};
#pragma omp for schedule(static)
    for (int64_t task = 0; task < n * n_blocks; ++task) {
      const Chunk chunk = chunk_at(first, task / n_blocks);
      const int64_t o = task % n_blocks * kOutputs, rows = std::min(kOutputs, n_out - o);
      multiply_block(chunk, weight + 9 * o * n_channels, rows, work);
      for (int64_t vector = 0; vector < chunk.n_vectors(); ++vector)
        for (int64_t r = 0; r < rows; r += 4)
          transform_output(chunk, work.products + r * kChunk, vector, bias ? bias + o + r : nullptr,
                           std::min<int64_t>(4, rows - r), n_out, y + o + r);
    }
  }
}

}  // namespace MVDREAM_FAST_ISA
}  // namespace mvdream_fast
