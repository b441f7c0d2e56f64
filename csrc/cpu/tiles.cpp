// The hash grid on one tile of samples: addresses in SIMD, one load per vertex, everything level by level.
#include "cpu/tiles.h"

#include <new>

#include "cpu/pages.h"

#ifdef _OPENMP
#include <omp.h>
#endif

namespace mvdream_fast::MVDREAM_FAST_ISA {
namespace {

// The cells of kLanes samples: the vertices' rows in the level and the weight of the upper side along each axis.
struct Cells {
  alignas(64) uint32_t index[8][kLanes];
  VecF high[3];
};

template <bool kHashed>
MVDREAM_FAST_INLINE void locate(GridLevel level, const float* unit, Cells& cells) {
  level.hashed = kHashed;
  VecU cell[3];
  for (int axis = 0; axis < 3; ++axis) {
    const VecF lattice = fused_multiply_add(load(unit + axis * kTile), level.scale, 0.5f);
    const VecI floor = truncate(lattice);  // lattice > 0, so that truncation is floor
    cells.high[axis] = lattice - to_float(floor);
    cell[axis] = (VecU)floor;
  }
  cell_indices<VecU>(level, cell[0], cell[1], cell[2],
                     [&](int corner, VecU index) { std::memcpy(cells.index[corner], &index, sizeof index); });
}

MVDREAM_FAST_INLINE VecF corner_weight(const Cells& cells, int corner) {
  VecF weight = corner & 1 ? cells.high[0] : 1.0f - cells.high[0];
  for (int axis = 1; axis < 3; ++axis) weight *= corner >> axis & 1 ? cells.high[axis] : 1.0f - cells.high[axis];
  return weight;
}

// d weight / d lattice coordinate along `axis`.
MVDREAM_FAST_INLINE VecF corner_slope(const Cells& cells, int corner, int axis) {
  VecF slope = splat(corner >> axis & 1 ? 1.0f : -1.0f);
  for (int other = 0; other < 3; ++other) {
    if (other != axis) slope *= corner >> other & 1 ? cells.high[other] : 1.0f - cells.high[other];
  }
  return slope;
}

MVDREAM_FAST_INLINE double pair(const float* entries, uint32_t index) {
  double both;
  std::memcpy(&both, entries + 2 * size_t(index), sizeof both);
  return both;
}

// The two features of kLanes entries: `slots` as in zip_low and zip_high, one 8-byte load an entry.
MVDREAM_FAST_INLINE void load_pairs(const float* entries, const uint32_t* index, VecF slots[2]) {
  VecD low, high;
  for (int slot = 0; slot < kLanes / 2; ++slot) {
    low[slot] = pair(entries, index[zipped_sample(slot)]);
    high[slot] = pair(entries, index[zipped_sample(slot + kLanes / 2)]);
  }
  slots[0] = (VecF)low;
  slots[1] = (VecF)high;
}

// Calls work(s, cells) for every kLanes samples of a tile, with the cells of the next ones located beforehand: indices
// that were stored a moment ago are slow to load one by one.
template <bool kHashed, typename Work>
MVDREAM_FAST_INLINE void for_each_cells(const GridLevel& level, const float* unit, Work work) {
  Cells cells[2];
  locate<kHashed>(level, unit, cells[0]);
  for (int s = 0; s < kTile; s += kLanes) {
    const int turn = s / kLanes & 1;
    if (s + kLanes < kTile) locate<kHashed>(level, unit + s + kLanes, cells[1 - turn]);
    work(s, cells[turn]);
  }
}

// Trilinear interpolation of pairs, axis by axis: 7 lerps instead of 8 products of weights.
template <bool kHashed>
void encode_pairs(const GridLevel& level, const float* entries, const float* unit, float* features) {
  for_each_cells<kHashed>(level, unit, [&](int s, const Cells& cells) __attribute__((always_inline)) {
    VecF value[8][2];
    for (int corner = 0; corner < 8; ++corner) load_pairs(entries, cells.index[corner], value[corner]);
    for (int axis = 0; axis < 3; ++axis) {
      const VecF high = cells.high[axis], f[2] = {zip_low(high, high), zip_high(high, high)};
      for (int c = 0; c < 4 >> axis; ++c) {
        for (int i = 0; i < 2; ++i) value[c][i] = value[2 * c][i] + f[i] * (value[2 * c + 1][i] - value[2 * c][i]);
      }
    }
    store(features + s, even(value[0][0], value[0][1]));
    store(features + kTile + s, odd(value[0][0], value[0][1]));
  });
}

template <int F, bool kHashed>
void encode_any(const GridLevel& level, const float* entries, const float* unit, float* features) {
  for (int s = 0; s < kTile; s += kLanes) {
    Cells cells;
    locate<kHashed>(level, unit + s, cells);
    float sum[kLanes][F] = {};
    for (int corner = 0; corner < 8; ++corner) {
      const VecF weight = corner_weight(cells, corner);
      for (int i = 0; i < kLanes; ++i) {
        const float* entry = entries + F * size_t(cells.index[corner][i]);
        for (int f = 0; f < F; ++f) sum[i][f] += weight[i] * entry[f];
      }
    }
    for (int f = 0; f < F; ++f) {
      for (int i = 0; i < kLanes; ++i) features[f * kTile + s + i] = sum[i][f];
    }
  }
}

typedef float Pair __attribute__((vector_size(8)));

MVDREAM_FAST_INLINE void add_pair(float* entry, const float* gradient) {
  Pair sum, term;
  std::memcpy(&sum, entry, sizeof sum);
  std::memcpy(&term, gradient, sizeof term);
  sum += term;
  std::memcpy(entry, &sum, sizeof sum);
}

template <bool kHashed, bool kWhole>
void scatter_pairs(const GridLevel& level, const float* unit, const float* d_features, uint32_t first, uint32_t last,
                   float* d_entries) {
  for_each_cells<kHashed>(level, unit, [&](int s, const Cells& cells) __attribute__((always_inline)) {
    const VecF d[2] = {load(d_features + s), load(d_features + kTile + s)};
    alignas(64) float gradient[8][2 * kLanes];
    for (int corner = 0; corner < 8; ++corner) {
      const VecF weight = corner_weight(cells, corner);
      store(gradient[corner], zip_low(weight * d[0], weight * d[1]));
      store(gradient[corner] + kLanes, zip_high(weight * d[0], weight * d[1]));
    }
    for (int slot = 0; slot < kLanes; ++slot) {
      for (int corner = 0; corner < 8; ++corner) {
        const uint32_t index = cells.index[corner][zipped_sample(slot)];
        if (kWhole || (index >= first && index < last)) {
          add_pair(d_entries + 2 * size_t(index), gradient[corner] + 2 * slot);
        }
      }
    }
  });
}

template <int F, bool kHashed>
void scatter_any(const GridLevel& level, const float* unit, const float* d_features, uint32_t first, uint32_t last,
                 float* d_entries) {
  for (int s = 0; s < kTile; s += kLanes) {
    Cells cells;
    locate<kHashed>(level, unit + s, cells);
    for (int corner = 0; corner < 8; ++corner) {
      const VecF weight = corner_weight(cells, corner);
      for (int i = 0; i < kLanes; ++i) {
        const uint32_t index = cells.index[corner][i];
        if (index < first || index >= last) continue;
        float* entry = d_entries + F * size_t(index);
        for (int f = 0; f < F; ++f) entry[f] += weight[i] * d_features[f * kTile + s + i];
      }
    }
  }
}

template <int F, bool kHashed>
void position_any(const GridLevel& level, const float* entries, const float* unit, const float* d_features,
                  float* d_unit) {
  for (int s = 0; s < kTile; s += kLanes) {
    Cells cells;
    locate<kHashed>(level, unit + s, cells);
    VecF slope[3] = {};
    for (int corner = 0; corner < 8; ++corner) {
      VecF dot = {};  // the entry's features times their gradients
      for (int i = 0; i < kLanes; ++i) {
        const float* entry = entries + F * size_t(cells.index[corner][i]);
        float d = 0;
        for (int f = 0; f < F; ++f) d += entry[f] * d_features[f * kTile + s + i];
        dot[i] = d;
      }
      for (int axis = 0; axis < 3; ++axis) slope[axis] += dot * corner_slope(cells, corner, axis);
    }
    for (int axis = 0; axis < 3; ++axis) {
      float* d = d_unit + axis * kTile + s;
      store(d, load(d) + slope[axis] * level.scale);
    }
  }
}

// Calls body with the number of features and whether the level is hashed as compile-time constants.
template <int F, typename Body>
MVDREAM_FAST_INLINE void with_hashed(bool hashed, Body body) {
  if (hashed) {
    body(std::integral_constant<int, F>(), std::true_type());
  } else {
    body(std::integral_constant<int, F>(), std::false_type());
  }
}

template <typename Body>
MVDREAM_FAST_INLINE void with_shape(const GridLevel& level, int n_features, Body body) {
  switch (n_features) {
    case 1:
      return with_hashed<1>(level.hashed, body);
    case 2:
      return with_hashed<2>(level.hashed, body);
    case 4:
      return with_hashed<4>(level.hashed, body);
    default:
      return with_hashed<8>(level.hashed, body);
  }
}

constexpr int64_t kOwnPages = int64_t(4) << 20;  // bytes from which a buffer has pages of its own

}  // namespace

float* Buffer::allocate(int64_t bytes) {
#ifdef __linux__
  if (bytes >= kOwnPages) {
    void* pages = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (pages == MAP_FAILED) throw std::bad_alloc();
    advise_huge_pages(pages, bytes);
    return static_cast<float*>(pages);
  }
#endif
  return static_cast<float*>(::operator new(bytes, std::align_val_t(64)));
}

void Buffer::release(float* data, int64_t bytes) {
#ifdef __linux__
  if (bytes >= kOwnPages) {
    munmap(data, bytes);
    return;
  }
#endif
  ::operator delete(data, std::align_val_t(64));
}

void encode_tile(const GridLevel& level, int n_features, const float* table, const float* unit, float* features) {
  const float* entries = table + level.offset * n_features;
  with_shape(level, n_features, [&](auto f, auto hashed) {
    if constexpr (f == 2) {
      encode_pairs<hashed>(level, entries, unit, features);
    } else {
      encode_any<f, hashed>(level, entries, unit, features);
    }
  });
}

void fetch_level(const GridLevel& level, int n_features, const float* table, int64_t n_tiles, int part, int n_parts) {
  constexpr int64_t kLine = 16;  // floats
  const int64_t n_lines = ceil_div(int64_t(level.size) * n_features, kLine);
  if (n_tiles * kTile * 4 < n_lines) return;
  const float* entries = table + level.offset * n_features;
  for (int64_t line = n_lines * part / n_parts; line < n_lines * (part + 1) / n_parts; ++line) {
    asm volatile(""
                 :
                 : "r"(entries[line * kLine]));  // a load, which the stream detectors follow; prefetches they may not
  }
}

void scatter_tile(const GridLevel& level, int n_features, const float* unit, const float* d_features, uint32_t first,
                  uint32_t last, float* d_table) {
  float* d_entries = d_table + level.offset * n_features;
  const bool whole = first == 0 && last == level.size;
  with_shape(level, n_features, [&](auto f, auto hashed) {
    if constexpr (f == 2) {
      if (whole) {
        scatter_pairs<hashed, true>(level, unit, d_features, first, last, d_entries);
      } else {
        scatter_pairs<hashed, false>(level, unit, d_features, first, last, d_entries);
      }
    } else {
      scatter_any<f, hashed>(level, unit, d_features, first, last, d_entries);
    }
  });
}

void position_tile(const GridLevel& level, int n_features, const float* table, const float* unit,
                   const float* d_features, float* d_unit) {
  const float* entries = table + level.offset * n_features;
  with_shape(level, n_features,
             [&](auto f, auto hashed) { position_any<f, hashed>(level, entries, unit, d_features, d_unit); });
}

bool load_tile(const float* positions, int n, float scale, float shift, float* unit) {
  int n_nan = 0;
  for (int axis = 0; axis < 3; ++axis) {
    float* row = unit + axis * kTile;
    for (int i = 0; i < n; ++i) row[i] = positions[3 * i + axis];
    for (int i = n; i < kTile; ++i) row[i] = -shift / scale;
    for (int s = 0; s < kTile; s += kLanes) {
      const VecF x = load(row + s);
      for (int i = 0; i < kLanes; ++i) n_nan += x[i] != x[i];
      store(row + s, min(max(fused_multiply_add(x, scale, shift), splat(0.0f)), splat(1.0f)));
    }
  }
  return n_nan == 0;
}

void scatter_run(const HashGrid& grid, int64_t n_tiles, const float* unit, const float* d_features, float* d_table) {
#ifdef _OPENMP
  const int n_threads = omp_get_num_threads();
#else
  const int n_threads = 1;
#endif
  const int n_parts = int(ceil_div(n_threads, grid.n_levels));
  const int width = grid.width();
  // Finest first: they are the slowest, and the short coarse ones fill the gaps at the end.
#pragma omp for schedule(dynamic, 1) nowait
  for (int task = 0; task < grid.n_levels * n_parts; ++task) {
    const int l = grid.n_levels - 1 - task / n_parts;
    const GridLevel& level = grid.levels[l];
    const uint32_t first = uint64_t(level.size) * (task % n_parts) / n_parts;
    const uint32_t last = uint64_t(level.size) * (task % n_parts + 1) / n_parts;
    fetch_level(level, grid.n_features, d_table, n_tiles, task % n_parts, n_parts);
    for (int64_t t = 0; t < n_tiles; ++t) {
      const float* d = d_features + (t * width + l * grid.n_features) * kTile;
      scatter_tile(level, grid.n_features, unit + t * 3 * kTile, d, first, last, d_table);
    }
  }
}

void zero_table(float* table, int64_t n) {
  constexpr int64_t kPiece = kHugePage / sizeof(float);
#pragma omp single
  advise_huge_pages(table, n * sizeof(float));
#pragma omp for schedule(dynamic, 1)
  for (int64_t piece = 0; piece < ceil_div(n, kPiece); ++piece) {
    const int64_t first = piece * kPiece;
    std::memset(table + first, 0, (n - first < kPiece ? n - first : kPiece) * sizeof(float));
  }
}

}  // namespace mvdream_fast::MVDREAM_FAST_ISA
