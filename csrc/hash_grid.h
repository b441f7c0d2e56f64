// Addressing of the multiresolution hash grid, tiny-cuda-nn's rounding and hash (Mueller et al. 2022): the maths that
// CPU and CUDA share. Templates take a scalar or a vector of uint32_t / float alike.
#pragma once

#include "hd.h"

namespace mvdream_fast {

constexpr int kMaxLevels = 32;

struct GridLevel {
  float scale;          // lattice coordinate = x * scale + 0.5
  uint32_t resolution;  // vertices along a side
  uint32_t size;        // entries; a power of two where hashed
  int64_t offset;       // first entry in the table
  bool hashed;
};

struct HashGrid {
  int n_levels = 0;
  int n_features = 0;
  GridLevel levels[kMaxLevels];

  MVDREAM_FAST_HD int width() const { return n_levels * n_features; }
  MVDREAM_FAST_HD int64_t n_entries() const { return levels[n_levels - 1].offset + levels[n_levels - 1].size; }
};

namespace MVDREAM_FAST_ISA {

// Row-major where the level is dense. A position on the upper face addresses one vertex beyond the side, which wraps
// around as in tiny-cuda-nn; one subtraction is enough, since the largest index is below twice the size.
template <typename U>
MVDREAM_FAST_HD U dense_index(const GridLevel& level, U x, U y, U z) {
  const U index = x + level.resolution * (y + level.resolution * z);
  const U wrapped = index - level.size;
  return index < wrapped ? index : wrapped;
}

// The partial products of the hash along y and z; the prime of x is 1.
constexpr uint32_t kPrimeY = 2654435761u;
constexpr uint32_t kPrimeZ = 805459861u;

// Calls emit(corner, index) for the 8 vertices of the cell (x, y, z); bit `axis` of `corner` is the upper side.
template <typename U, typename Emit>
MVDREAM_FAST_HD void cell_indices(const GridLevel& level, U x, U y, U z, Emit emit) {
  if (level.hashed) {
    const uint32_t mask = level.size - 1;
    const U hy[2] = {y * kPrimeY, y * kPrimeY + kPrimeY};
    const U hz[2] = {z * kPrimeZ, z * kPrimeZ + kPrimeZ};
    for (int c = 0; c < 8; ++c) emit(c, ((x + uint32_t(c & 1)) ^ hy[c >> 1 & 1] ^ hz[c >> 2]) & mask);
  } else {
    for (int c = 0; c < 8; ++c) {
      emit(c, dense_index<U>(level, x + uint32_t(c & 1), y + uint32_t(c >> 1 & 1), z + uint32_t(c >> 2)));
    }
  }
}

}  // namespace MVDREAM_FAST_ISA
}  // namespace mvdream_fast
