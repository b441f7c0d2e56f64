// The hash-grid encoding as an op of its own: tiles in, rows of features out, and the way back.
#include "cpu/hash_encode.h"

#include "cpu/tiles.h"

namespace mvdream_fast::MVDREAM_FAST_ISA {
namespace {

// Rows [n, width] to a tile [width][kTile], zero beyond n; and back.
void to_tile(const float* rows, int n, int width, float* tile) {
  for (int c = 0; c < width; ++c) {
    for (int i = 0; i < n; ++i) tile[c * kTile + i] = rows[int64_t(i) * width + c];
    for (int i = n; i < kTile; ++i) tile[c * kTile + i] = 0;
  }
}

void to_rows(const float* tile, int n, int width, float* rows) {
  for (int i = 0; i < n; ++i) {
    for (int c = 0; c < width; ++c) rows[int64_t(i) * width + c] = tile[c * kTile + i];
  }
}

// Gradients of clamped coordinates vanish outside the cube; its faces count as inside, as in torch.clamp.
void store_d_positions(const float* d_unit, const float* positions, int n, float* d_positions) {
  for (int i = 0; i < n; ++i) {
    for (int axis = 0; axis < 3; ++axis) {
      const float x = positions[3 * i + axis];
      d_positions[3 * i + axis] = x >= 0 && x <= 1 ? d_unit[axis * kTile + i] : 0.0f;
    }
  }
}

}  // namespace

bool hash_encode_forward(const HashGrid& grid, const float* table, const float* positions, int64_t n, float* out,
                         int n_threads) {
  const int width = grid.width();
  const int64_t n_tiles = ceil_div(n, kTile), per_run = run_tiles(n_tiles, width);
  const Buffer unit(per_run * 3 * kTile), features(per_run * width * kTile);
  int n_bad = 0;
#pragma omp parallel num_threads(n_threads) reduction(+ : n_bad)
  for (int64_t begin = 0; begin < n_tiles; begin += per_run) {
    const int64_t tiles = n_tiles - begin < per_run ? n_tiles - begin : per_run;
#pragma omp for schedule(static)
    for (int64_t t = 0; t < tiles; ++t) {
      n_bad += !load_tile(positions + (begin + t) * 3 * kTile, in_tile(n, begin + t), 1, 0, unit.get() + t * 3 * kTile);
    }
    for (int l = 0; l < grid.n_levels; ++l) {
#pragma omp for schedule(static) nowait
      for (int64_t t = 0; t < tiles; ++t) {
        float* rows = features.get() + (t * width + l * grid.n_features) * kTile;
        encode_tile(grid.levels[l], grid.n_features, table, unit.get() + t * 3 * kTile, rows);
      }
    }
#pragma omp barrier
#pragma omp for schedule(static)
    for (int64_t t = 0; t < tiles; ++t) {
      to_rows(features.get() + t * width * kTile, in_tile(n, begin + t), width, out + (begin + t) * kTile * width);
    }
  }
  return n_bad == 0;
}

bool hash_encode_backward(const HashGrid& grid, const float* table, const float* positions, int64_t n,
                          const float* d_out, float* d_table, float* d_positions, int n_threads) {
  const int width = grid.width();
  const int64_t n_tiles = ceil_div(n, kTile), per_run = run_tiles(n_tiles, width);
  const Buffer unit(per_run * 3 * kTile), d_unit(per_run * 3 * kTile), d_features(per_run * width * kTile);
  int n_bad = 0;
#pragma omp parallel num_threads(n_threads) reduction(+ : n_bad)
  {
    if (d_table != nullptr) zero_table(d_table, grid.n_entries() * grid.n_features);
    for (int64_t begin = 0; begin < n_tiles; begin += per_run) {
      const int64_t tiles = n_tiles - begin < per_run ? n_tiles - begin : per_run;
#pragma omp for schedule(static)
      for (int64_t t = 0; t < tiles; ++t) {
        const int count = in_tile(n, begin + t);
        n_bad += !load_tile(positions + (begin + t) * 3 * kTile, count, 1, 0, unit.get() + t * 3 * kTile);
        to_tile(d_out + (begin + t) * kTile * width, count, width, d_features.get() + t * width * kTile);
        std::memset(d_unit.get() + t * 3 * kTile, 0, 3 * kTile * sizeof(float));
      }
      if (d_table != nullptr) scatter_run(grid, tiles, unit.get(), d_features.get(), d_table);
      for (int l = 0; d_positions != nullptr && l < grid.n_levels; ++l) {
#pragma omp for schedule(static) nowait
        for (int64_t t = 0; t < tiles; ++t) {
          const float* d = d_features.get() + (t * width + l * grid.n_features) * kTile;
          position_tile(grid.levels[l], grid.n_features, table, unit.get() + t * 3 * kTile, d,
                        d_unit.get() + t * 3 * kTile);
        }
      }
#pragma omp barrier
#pragma omp for schedule(static)
      for (int64_t t = 0; t < (d_positions != nullptr ? tiles : 0); ++t) {
        const int64_t first = (begin + t) * 3 * kTile;
        store_d_positions(d_unit.get() + t * 3 * kTile, positions + first, in_tile(n, begin + t), d_positions + first);
      }
    }
  }
  return n_bad == 0;
}

}  // namespace mvdream_fast::MVDREAM_FAST_ISA
