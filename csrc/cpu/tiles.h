// How a batch of samples is laid out while it is worked on: tiles of kTile samples, structure of arrays, so that every
// loop runs over whole vectors. The last tile is padded with points at the origin of the unit cube.
#pragma once

#include <cstdint>
#include <type_traits>

#include "hash_grid.h"
#include "simd.h"

namespace mvdream_fast::MVDREAM_FAST_ISA {

constexpr int kTile = 192;  // divides into panels of 3 vectors on every instruction set

// A batch is cut into runs that are encoded level by level: so many samples share one pass over a level's entries that
// a level is fetched from memory once a run, while the features of the run stay below this size.
constexpr int64_t kRunBytes = int64_t(32) << 20;
constexpr int64_t kBlockTiles = 8;  // weight gradients are summed per block of tiles, then block by block in order

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Tiles in each run but the last: whole blocks, about equally many in every run. No thread count goes into it.
inline int64_t run_tiles(int64_t n_tiles, int width) {
  const int64_t most = kRunBytes / (int64_t(width) * kTile * int64_t(sizeof(float)));
  const int64_t n_runs = ceil_div(n_tiles, most < kBlockTiles ? kBlockTiles : most - kBlockTiles + 1);
  return n_runs == 0 ? 0 : ceil_div(ceil_div(n_tiles, n_runs), kBlockTiles) * kBlockTiles;
}

// Samples of tile `tile` of a batch of n.
inline int in_tile(int64_t n, int64_t tile) { return int(n - tile * kTile < kTile ? n - tile * kTile : kTile); }

// Uninitialised floats on a cache-line boundary; throws std::bad_alloc. A large one has pages of its own: malloc would
// keep them after a call, beside whatever the caller allocates next.
class Buffer {
 public:
  explicit Buffer(int64_t n) : bytes_(n * int64_t(sizeof(float))), data_(allocate(bytes_)) {}
  ~Buffer() { release(data_, bytes_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  float* get() const { return data_; }

 private:
  static float* allocate(int64_t bytes);
  static void release(float* data, int64_t bytes);

  int64_t bytes_;
  float* data_;
};

// One level of a tile: unit [3][kTile] in [0, 1], features and their gradients [F][kTile].
void encode_tile(const GridLevel& level, int n_features, const float* table, const float* unit, float* features);

// Fetches this thread's share of a level's entries in order, before n_tiles * kTile samples ask for them at random: a
// stream from memory is several times faster. Does nothing where the samples are too few to want most of the level.
void fetch_level(const GridLevel& level, int n_features, const float* table, int64_t n_tiles, int part, int n_parts);

// Adds the gradient of the entries in [first, last) of the level; the calls' order decides the order of the sums.
void scatter_tile(const GridLevel& level, int n_features, const float* unit, const float* d_features, uint32_t first,
                  uint32_t last, float* d_table);

// Adds the gradient of the positions, d_unit [3][kTile].
void position_tile(const GridLevel& level, int n_features, const float* table, const float* unit,
                   const float* d_features, float* d_unit);

// Loads n <= kTile points [n, 3], maps them to x * scale + shift, clamps them to the unit cube and pads the tile.
// Returns false when one of them is NaN.
bool load_tile(const float* positions, int n, float scale, float shift, float* unit);

// Scatters a run of tiles: every level, or part of one where there are more threads than levels, has one owner, who
// adds in the order of the samples. Called by all threads of a parallel region; no barrier before or after.
void scatter_run(const HashGrid& grid, int64_t n_tiles, const float* unit, const float* d_features, float* d_table);

// Zeroes a gradient table with all threads of a parallel region; asks for huge pages first, as the memory is fresh.
void zero_table(float* table, int64_t n);

}  // namespace mvdream_fast::MVDREAM_FAST_ISA
