// The radiance field, run by run: every level of the grid is encoded for a whole run of samples, then the networks go
// over it tile by tile. The backward pass repeats that and turns the features of a run into their gradients in place.
#include "cpu/field.h"

#include "cpu/tiles.h"
#include "mlp.h"

#ifdef _OPENMP
#include <omp.h>
#else
static int omp_get_thread_num() { return 0; }
static int omp_get_num_threads() { return 1; }
#endif

namespace mvdream_fast::MVDREAM_FAST_ISA {
namespace {

// Distance from the centre in scene units, [kTile]; the padding's is 0.
void norms(const float* positions, int n, float* out) {
  for (int i = 0; i < kTile; ++i) {
    const float* p = positions + 3 * (i < n ? i : 0);
    out[i] = __builtin_sqrtf(p[0] * p[0] + p[1] * p[1] + p[2] * p[2]);
  }
}

// The network's output plus the density bias, in place.
void add_bias(const Field& field, const float* norm, float* raw) {
  if (field.bias_scale == 0) return;
  for (int s = 0; s < kTile; s += kLanes) {
    store(raw + s, load(raw + s) + field.bias_scale * (1.0f - load(norm + s) / field.bias_std));
  }
}

VecF density(const Field& field, VecF raw) {
  if (field.activation == DensityActivation::none) return raw;
  return field.activation == DensityActivation::softplus ? softplus(raw) : exp(raw);
}

VecF density_slope(const Field& field, VecF raw) {
  if (field.activation == DensityActivation::none) return splat(1.0f);
  return field.activation == DensityActivation::softplus ? sigmoid(raw) : exp(raw);
}

// Memory of one thread while it works on a tile, as offsets in floats.
struct Scratch {
  static constexpr int64_t norm = 0, raw_density = kTile, raw_color = 2 * kTile;  // [1], [1] and [3][kTile]
  static constexpr int64_t d_density = 5 * kTile, d_color = 6 * kTile;            // gradients of the raw outputs
  static constexpr int64_t d_features = 9 * kTile;                                // [width][kTile]
  int64_t density, color, total;                                                  // hidden layers

  explicit Scratch(const Field& field) {
    density = d_features + field.grid.width() * kTile;
    color = density + mlp_scratch(field.density);
    total = color + (field.color.n_layers > 0 ? mlp_scratch(field.color) : 0);
  }
};

// What the passes over a batch share.
struct Batch {
  const Field& field;
  const float* positions;
  int64_t n, n_tiles, per_run;
  int width;
  Buffer unit, features;
  Scratch layout;
  Buffer scratch;

  Batch(const Field& field, const float* positions, int64_t n, int n_threads)
      : field(field),
        positions(positions),
        n(n),
        n_tiles(ceil_div(n, kTile)),
        per_run(run_tiles(n_tiles, field.grid.width())),
        width(field.grid.width()),
        unit(per_run * 3 * kTile),
        features(per_run * width * kTile),
        layout(field),
        scratch(layout.total * n_threads) {}

  int64_t tiles(int64_t begin) const { return n_tiles - begin < per_run ? n_tiles - begin : per_run; }

  // Tiles that a thread takes at a time where no sum depends on it: few enough that small batches share out evenly.
  int share(int64_t begin) const {
    const int64_t even = tiles(begin) / (8 * omp_get_num_threads());
    return int(even < 1 ? 1 : even < kBlockTiles ? even : kBlockTiles);
  }

  float* unit_of(int64_t t) const { return unit.get() + t * 3 * kTile; }
  float* features_of(int64_t t) const { return features.get() + t * width * kTile; }
  float* own_scratch() const { return scratch.get() + layout.total * omp_get_thread_num(); }

  // Encodes the run that begins at tile `begin`; called by all threads, ends with a barrier. Returns NaN tiles seen.
  int encode(int64_t begin) const {
    int n_bad = 0;
    const int64_t n_run = tiles(begin);
    const int chunk = share(begin);
#pragma omp for schedule(static)
    for (int64_t t = 0; t < n_run; ++t) {
      const float* p = positions + (begin + t) * 3 * kTile;
      n_bad += !load_tile(p, in_tile(n, begin + t), field.to_unit, 0.5f, unit_of(t));
    }
    for (int l = 0; l < field.grid.n_levels; ++l) {
      fetch_level(field.grid.levels[l], field.grid.n_features, field.table, n_run, omp_get_thread_num(),
                  omp_get_num_threads());
#pragma omp for schedule(dynamic, chunk) nowait
      for (int64_t t = 0; t < n_run; ++t) {
        float* rows = features_of(t) + l * field.grid.n_features * kTile;
        encode_tile(field.grid.levels[l], field.grid.n_features, field.table, unit_of(t), rows);
      }
    }
#pragma omp barrier
    return n_bad;
  }

  // The features of a run outgrow the nearer caches: those of the next tile are called while this one is worked on.
  void prefetch(int64_t begin, int64_t t) const {
    if (t >= tiles(begin)) return;
    for (int i = 0; i < width * kTile; i += 16) __builtin_prefetch(features_of(t) + i);
  }

  // Both networks on tile t of the run that begins at `begin`; raw outputs and hidden layers are left in scratch.
  void networks(int64_t begin, int64_t t, bool with_color, float* own) const {
    prefetch(begin, t + 1);
    norms(positions + (begin + t) * 3 * kTile, in_tile(n, begin + t), own + Scratch::norm);
    mlp_forward(field.density, features_of(t), own + layout.density, own + Scratch::raw_density);
    add_bias(field, own + Scratch::norm, own + Scratch::raw_density);
    if (with_color) mlp_forward(field.color, features_of(t), own + layout.color, own + Scratch::raw_color);
  }
};

void store_sigmas(const Field& field, int n, float* raw, float* sigmas) {
  for (int s = 0; s < kTile; s += kLanes) store(raw + s, density(field, load(raw + s)));
  std::memcpy(sigmas, raw, n * sizeof(float));
}

void store_rgb(const Field& field, int n, float* raw, float* rgb) {
  for (int s = 0; s < (field.color_sigmoid ? 3 * kTile : 0); s += kLanes) store(raw + s, sigmoid(load(raw + s)));
  for (int i = 0; i < n; ++i) {
    for (int c = 0; c < 3; ++c) rgb[3 * i + c] = raw[c * kTile + i];
  }
}

// Gradients of the raw outputs from those of the activated ones, zero in the padding: [1][kTile] and [3][kTile].
void d_raw_density(const Field& field, const float* d_sigmas, int n, const float* raw, float* d_raw) {
  for (int i = 0; i < kTile; ++i) d_raw[i] = i < n && d_sigmas != nullptr ? d_sigmas[i] : 0.0f;
  for (int s = 0; s < kTile; s += kLanes) store(d_raw + s, load(d_raw + s) * density_slope(field, load(raw + s)));
}

void d_raw_color(const Field& field, const float* d_rgb, int n, const float* raw, float* d_raw) {
  for (int c = 0; c < 3; ++c) {
    float* d = d_raw + c * kTile;
    for (int i = 0; i < kTile; ++i) d[i] = i < n ? d_rgb[3 * i + c] : 0.0f;
    for (int s = 0; s < (field.color_sigmoid ? kTile : 0); s += kLanes) {
      const VecF y = sigmoid(load(raw + c * kTile + s));
      store(d + s, load(d + s) * y * (1.0f - y));
    }
  }
}

// The way through the density bias; its (sub)gradient at the centre is 0.
void store_d_positions_of_bias(const Field& field, const float* positions, int n, const float* norm, const float* d_raw,
                               float* d_positions) {
  for (int i = 0; i < n; ++i) {
    const float d = norm[i] > 0 ? -d_raw[i] * field.bias_scale / (field.bias_std * norm[i]) : 0.0f;
    for (int axis = 0; axis < 3; ++axis) d_positions[3 * i + axis] = d * positions[3 * i + axis];
  }
}

// The way through the encoding: zero outside the box, whose faces count as inside.
void add_d_positions_of_grid(const Field& field, const float* positions, int n, const float* d_unit,
                             float* d_positions) {
  const float slope = field.to_unit;
  for (int i = 0; i < n; ++i) {
    for (int axis = 0; axis < 3; ++axis) {
      const float x = positions[3 * i + axis] * slope + 0.5f;
      if (x >= 0 && x <= 1) d_positions[3 * i + axis] += d_unit[axis * kTile + i] * slope;
    }
  }
}

// Adds the blocks' weight gradients to the totals, block by block: an order that no number of threads changes.
void add_blocks(const float* blocks, int64_t n_blocks, int64_t n_weights, double* total) {
#pragma omp for schedule(static)
  for (int64_t w = 0; w < n_weights; ++w) {
    double sum = total[w];
    for (int64_t b = 0; b < n_blocks; ++b) sum += blocks[b * n_weights + w];
    total[w] = sum;
  }
}

// The backward pass over a batch; its methods but `write_weights` are called by all threads of a parallel region.
struct Backward {
  const Batch& batch;
  const Field& field;
  const float* d_sigmas;
  const float* d_rgb;
  const FieldGradients& gradients;
  int64_t n_density, n_weights;
  Buffer transposed, blocks, totals, d_unit;

  Backward(const Batch& batch, const float* d_sigmas, const float* d_rgb, const FieldGradients& gradients)
      : batch(batch),
        field(batch.field),
        d_sigmas(d_sigmas),
        d_rgb(d_rgb),
        gradients(gradients),
        n_density(field.density.n_weights()),
        n_weights(n_density + field.color.n_weights()),
        transposed(n_weights),
        blocks(ceil_div(batch.per_run, kBlockTiles) * n_weights),
        totals(2 * n_weights),
        d_unit(gradients.positions != nullptr ? batch.per_run * 3 * kTile : 0) {
    transpose_weights(field.density, transposed.get());
    transpose_weights(field.color, transposed.get() + n_density);
    std::memset(totals.get(), 0, 2 * n_weights * sizeof(float));
  }

  bool wants_weights() const { return gradients.density != nullptr || gradients.color != nullptr; }
  double* total() const { return reinterpret_cast<double*>(totals.get()); }

  // Turns the features of a tile into their gradients; adds to the weights' gradients of its block.
  void tile(int64_t begin, int64_t t, float* d_weights) const {
    float* own = batch.own_scratch();
    float* features = batch.features_of(t);
    float* d_features = own + Scratch::d_features;
    const int count = in_tile(batch.n, begin + t);
    const int64_t first = (begin + t) * kTile;
    batch.networks(begin, t, d_rgb != nullptr, own);
    d_raw_density(field, d_sigmas != nullptr ? d_sigmas + first : nullptr, count, own + Scratch::raw_density,
                  own + Scratch::d_density);
    mlp_backward(field.density, transposed.get(), features, own + Scratch::d_density, own + batch.layout.density,
                 d_weights, d_features, false);
    if (d_rgb != nullptr) {
      d_raw_color(field, d_rgb + 3 * first, count, own + Scratch::raw_color, own + Scratch::d_color);
      mlp_backward(field.color, transposed.get() + n_density, features, own + Scratch::d_color,
                   own + batch.layout.color, d_weights == nullptr ? nullptr : d_weights + n_density, d_features, true);
    }
    std::memcpy(features, d_features, batch.width * kTile * sizeof(float));
    if (gradients.positions != nullptr) {
      store_d_positions_of_bias(field, batch.positions + 3 * first, count, own + Scratch::norm,
                                own + Scratch::d_density, gradients.positions + 3 * first);
    }
  }

  void networks(int64_t begin) const {
    const int64_t n_run = batch.tiles(begin), n_blocks = ceil_div(n_run, kBlockTiles);
#pragma omp for schedule(dynamic, 1)
    for (int64_t b = 0; b < n_blocks; ++b) {
      float* d_weights = wants_weights() ? blocks.get() + b * n_weights : nullptr;
      if (d_weights != nullptr) std::memset(d_weights, 0, n_weights * sizeof(float));
      for (int64_t t = b * kBlockTiles; t < n_run && t < (b + 1) * kBlockTiles; ++t) tile(begin, t, d_weights);
    }
    if (wants_weights()) add_blocks(blocks.get(), n_blocks, n_weights, total());
  }

  void positions(int64_t begin) const {
    const HashGrid& grid = field.grid;
    const int64_t n_run = batch.tiles(begin);
#pragma omp for schedule(static)
    for (int64_t t = 0; t < n_run; ++t) std::memset(d_unit.get() + t * 3 * kTile, 0, 3 * kTile * sizeof(float));
    for (int l = 0; l < grid.n_levels; ++l) {
#pragma omp for schedule(static) nowait
      for (int64_t t = 0; t < n_run; ++t) {
        position_tile(grid.levels[l], grid.n_features, field.table, batch.unit_of(t),
                      batch.features_of(t) + l * grid.n_features * kTile, d_unit.get() + t * 3 * kTile);
      }
    }
#pragma omp for schedule(static)
    for (int64_t t = 0; t < n_run; ++t) {
      const int64_t first = (begin + t) * 3 * kTile;
      add_d_positions_of_grid(field, batch.positions + first, in_tile(batch.n, begin + t), d_unit.get() + t * 3 * kTile,
                              gradients.positions + first);
    }
  }

  void write_weights() const {
    for (int64_t w = 0; w < n_weights; ++w) {
      float* out = w < n_density ? gradients.density : gradients.color;
      if (out != nullptr) out[w < n_density ? w : w - n_density] = float(total()[w]);
    }
  }
};

}  // namespace

bool field_forward(const Field& field, const float* positions, int64_t n, float* sigmas, float* rgb, int n_threads) {
  const Batch batch(field, positions, n, n_threads);
  int n_bad = 0;
#pragma omp parallel num_threads(n_threads) reduction(+ : n_bad)
  for (int64_t begin = 0; begin < batch.n_tiles; begin += batch.per_run) {
    n_bad += batch.encode(begin);
    const int64_t n_run = batch.tiles(begin);
    const int chunk = batch.share(begin);
#pragma omp for schedule(dynamic, chunk)
    for (int64_t t = 0; t < n_run; ++t) {
      float* own = batch.own_scratch();
      const int count = in_tile(n, begin + t);
      const int64_t first = (begin + t) * kTile;
      batch.networks(begin, t, rgb != nullptr, own);
      store_sigmas(field, count, own + Scratch::raw_density, sigmas + first);
      if (rgb != nullptr) store_rgb(field, count, own + Scratch::raw_color, rgb + 3 * first);
    }
  }
  return n_bad == 0;
}

bool field_backward(const Field& field, const float* positions, int64_t n, const float* d_sigmas, const float* d_rgb,
                    const FieldGradients& gradients, int n_threads) {
  const Batch batch(field, positions, n, n_threads);
  const Backward backward(batch, d_sigmas, d_rgb, gradients);
  int n_bad = 0;
#pragma omp parallel num_threads(n_threads) reduction(+ : n_bad)
  {
    if (gradients.table != nullptr) zero_table(gradients.table, field.grid.n_entries() * field.grid.n_features);
    for (int64_t begin = 0; begin < batch.n_tiles; begin += batch.per_run) {
      n_bad += batch.encode(begin);
      backward.networks(begin);
      if (gradients.table != nullptr) {
        scatter_run(field.grid, batch.tiles(begin), batch.unit.get(), batch.features.get(), gradients.table);
      }
      if (gradients.positions != nullptr) backward.positions(begin);
#pragma omp barrier
    }
  }
  backward.write_weights();
  return n_bad == 0;
}

}  // namespace mvdream_fast::MVDREAM_FAST_ISA
