// rasterize on CPUs: faces are sorted into tiles of the screen, and each tile is drawn and written by one thread.
//
// Faces are sorted in fixed chunks, so that a tile's list is in the order of the faces whatever the number of threads.
#include "rasterize.h"

#include <algorithm>
#include <vector>

#include "cpu/scatter.h"
#include "cpu/shapes.h"
#include "cpu/thrown.h"
#include "simd.h"

namespace mvdream_fast {
namespace MVDREAM_FAST_ISA {
namespace {

constexpr int kTile = 32, kRow = kTile + kLanes;  // lanes beyond a tile's end write what nobody reads
constexpr int kPerVector = kLanes / 2;
constexpr int64_t kMostChunks = 32, kFacesPerChunk = 2048;
constexpr double kNoDepth = 2;

typedef int64_t VecL __attribute__((vector_size(kLanes * 4)));

VecD load_doubles(const double* p) {
  VecD v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
void store_doubles(double* p, VecD v) { std::memcpy(p, &v, sizeof v); }

// A piece of a face that was cut at the edge of what can be seen.
struct Piece {
  Snapped corners[3];
  int32_t face;
};

// One image while it is drawn.
struct Drawing {
  const Meshes& meshes;
  const float* pos;  // of this image
  Viewport screen;
  int tiles_x, tiles_y, n_tiles;
  int64_t n_chunks, per_chunk;
  std::vector<Snapped> vertices;
  std::vector<uint8_t> whole;              // vertices that need no clipping
  std::vector<std::vector<Piece>> pieces;  // of each chunk
  std::vector<int64_t> starts;             // [chunks, tiles]: of a chunk's entries in `entries`
  std::vector<int64_t> entries;            // tile after tile: a face, or -1 - (a piece, 32 bits; its chunk above)
  std::vector<int64_t> tile_starts;        // [tiles + 1]

  Drawing(const Meshes& meshes)
      : meshes(meshes),
        pos(meshes.pos),
        screen{meshes.width, meshes.height},
        tiles_x((meshes.width + kTile - 1) / kTile),
        tiles_y((meshes.height + kTile - 1) / kTile),
        n_tiles(tiles_x * tiles_y) {
    per_chunk = std::max(kFacesPerChunk, (meshes.n_faces + kMostChunks - 1) / kMostChunks);
    n_chunks = (meshes.n_faces + per_chunk - 1) / per_chunk;
    vertices.resize(meshes.n_vertices);
    whole.resize(meshes.n_vertices);
    pieces.resize(n_chunks);
    starts.resize(n_chunks * n_tiles);
    tile_starts.resize(n_tiles + 1);
  }

  const int32_t* face(int64_t f) const { return meshes.tri + 3 * f; }
  int64_t first_face(int64_t chunk) const { return chunk * per_chunk; }
  int64_t end_face(int64_t chunk) const { return std::min(meshes.n_faces, (chunk + 1) * per_chunk); }
};

int snap_vertices(Drawing* drawing, int n_threads) {
  int n_bad = 0;
#pragma omp parallel for schedule(static) num_threads(n_threads) reduction(+ : n_bad)
  for (int64_t v = 0; v < drawing->meshes.n_vertices; ++v) {
    const Corner corner = corner_of(drawing->pos + 4 * v);
    n_bad += !is_finite(corner);
    drawing->whole[v] = needs_no_clipping(corner, drawing->screen);
    if (drawing->whole[v]) drawing->vertices[v] = snap(corner, drawing->screen);
  }
  return n_bad;
}

template <typename Visit>
void visit_tiles(const Drawing& drawing, const Snapped& a, const Snapped& b, const Snapped& c, Visit visit) {
  const Box box = box_of(a, b, c, drawing.screen);
  if (box.x0 > box.x1 || box.y0 > box.y1 || area_of(a, b, c) == 0) return;
  for (int y = box.y0 / kTile; y <= box.y1 / kTile; ++y) {
    for (int x = box.x0 / kTile; x <= box.x1 / kTile; ++x) visit(y * drawing.tiles_x + x);
  }
}

// The pieces of a face that is cut: a fan of its visible polygon.
void cut_face(const Drawing& drawing, int64_t face, std::vector<Piece>* pieces) {
  Corner corners[3];
  Snapped polygon[kMostCorners];
  for (int k = 0; k < 3; ++k) corners[k] = corner_of(drawing.pos + 4 * int64_t(drawing.face(face)[k]));
  const int n = clip(corners, drawing.screen, polygon);
  for (int k = 2; k < n; ++k) pieces->push_back({{polygon[0], polygon[k - 1], polygon[k]}, int32_t(face)});
}

// Calls visit(tile, entry) for all of a chunk's faces and pieces. `cuts`: makes the pieces; without, they are there.
template <typename Visit>
void visit_chunk(Drawing* drawing, int64_t chunk, bool cuts, Visit visit) {
  size_t piece = 0;
  std::vector<Piece>& pieces = drawing->pieces[chunk];
  for (int64_t f = drawing->first_face(chunk); f < drawing->end_face(chunk); ++f) {
    const int32_t* v = drawing->face(f);
    if (drawing->whole[v[0]] && drawing->whole[v[1]] && drawing->whole[v[2]]) {
      const Snapped* at = drawing->vertices.data();
      visit_tiles(*drawing, at[v[0]], at[v[1]], at[v[2]], [&](int tile) { visit(tile, f); });
      continue;
    }
    if (cuts) cut_face(*drawing, f, &pieces);
    for (; piece < pieces.size() && pieces[piece].face == f; ++piece) {
      const Snapped* at = pieces[piece].corners;
      const int64_t entry = -1 - ((chunk << 32) + int64_t(piece));
      visit_tiles(*drawing, at[0], at[1], at[2], [&](int tile) { visit(tile, entry); });
    }
  }
}

bool has_vertices(const Drawing& drawing, int64_t chunk) {
  const int32_t *v = drawing.face(drawing.first_face(chunk)), *end = drawing.face(drawing.end_face(chunk));
  uint32_t highest = 0;
  for (; v < end; ++v) highest = std::max(highest, uint32_t(*v));  // a negative number is a high one
  return int64_t(highest) < drawing.meshes.n_vertices;
}

// Counts, then fills: each tile's list in the order of the chunks.
int sort_into_tiles(Drawing* drawing, int n_threads) {
  int n_bad = 0;
  const int64_t n_tiles = drawing->n_tiles;
  Thrown thrown;
#pragma omp parallel for schedule(dynamic, 1) num_threads(n_threads) reduction(+ : n_bad)
  for (int64_t chunk = 0; chunk < drawing->n_chunks; ++chunk) {
    int64_t* counts = drawing->starts.data() + chunk * n_tiles;
    std::fill(counts, counts + n_tiles, 0);
    drawing->pieces[chunk].clear();
    if (has_vertices(*drawing, chunk))
      thrown.keep([&] { visit_chunk(drawing, chunk, true, [&](int tile, int64_t) { ++counts[tile]; }); });
    else
      ++n_bad;
  }
  thrown.rethrow();
  if (n_bad) return n_bad;
  int64_t total = 0;
  for (int64_t tile = 0; tile < n_tiles; ++tile) {
    drawing->tile_starts[tile] = total;
    for (int64_t chunk = 0; chunk < drawing->n_chunks; ++chunk) {
      const int64_t count = drawing->starts[chunk * n_tiles + tile];
      drawing->starts[chunk * n_tiles + tile] = total;
      total += count;
    }
  }
  drawing->tile_starts[n_tiles] = total;
  drawing->entries.resize(total);
#pragma omp parallel for schedule(dynamic, 1) num_threads(n_threads)
  for (int64_t chunk = 0; chunk < drawing->n_chunks; ++chunk) {
    int64_t* next = drawing->starts.data() + chunk * n_tiles;
    visit_chunk(drawing, chunk, false, [&](int tile, int64_t entry) { drawing->entries[next[tile]++] = entry; });
  }
  return 0;
}

// What lies nearest in a tile: depths, and ids (face + 1, 0 for none) as doubles, so that both are blended alike.
struct Tile {
  int x0, y0;
  double depth[kTile * kRow], id[kTile * kRow];
};

struct Lanes {
  VecD nth;
  Lanes() {
    for (int i = 0; i < kPerVector; ++i) nth[i] = i;
  }
};

void draw(const Snapped* at, int64_t face, const Viewport& screen, const Lanes& lanes, Tile* tile) {
  Box box = box_of(at[0], at[1], at[2], screen);
  box.x0 = std::max(box.x0, tile->x0);
  box.y0 = std::max(box.y0, tile->y0);
  box.x1 = std::min(box.x1, tile->x0 + kTile - 1);
  box.y1 = std::min(box.y1, tile->y0 + kTile - 1);
  Edges edges;
  if (!set_edges(at[0], at[1], at[2], box.x0, box.y0, &edges)) return;
  for (int k = 0; k < 3; ++k) {  // an edge that has all of the box on its outside
    const double right = edges.step_x[k] * (box.x1 - box.x0), up = edges.step_y[k] * (box.y1 - box.y0);
    if (edges.at[k] + std::max(right, 0.0) + std::max(up, 0.0) < 0) return;
  }
  VecD e[3];
  for (int k = 0; k < 3; ++k) e[k] = edges.at[k] + edges.step_x[k] * lanes.nth;
  const VecD column = double(box.x0) + lanes.nth, new_id = double(face + 1) - VecD{};
  for (int y = box.y0; y <= box.y1; ++y) {
    const double rows = y - box.y0, row_depth = edges.depth + edges.depth_y * (y - edges.origin_y);
    const int64_t start = int64_t(y - tile->y0) * kRow - tile->x0;
    for (int x = box.x0; x <= box.x1; x += kPerVector) {
      const double columns = x - box.x0;
      VecL inside = ~VecL{};
      for (int k = 0; k < 3; ++k) inside &= e[k] + (edges.step_x[k] * columns + edges.step_y[k] * rows) >= 0.0;
      double *depth = tile->depth + start + x, *id = tile->id + start + x;
      const VecD exact = row_depth + edges.depth_x * (column + (columns - edges.origin_x));
      const VecD rounded = (exact + kDepthRounding) - kDepthRounding, before = load_doubles(depth);
      const VecL nearer = inside & (rounded < before);
      store_doubles(depth, nearer ? rounded : before);
      store_doubles(id, nearer ? new_id : load_doubles(id));
    }
  }
}

void draw_tile(const Drawing& drawing, int number, const Lanes& lanes, Tile* tile) {
  tile->x0 = number % drawing.tiles_x * kTile;
  tile->y0 = number / drawing.tiles_x * kTile;
  std::fill(tile->depth, tile->depth + kTile * kRow, kNoDepth);
  std::fill(tile->id, tile->id + kTile * kRow, 0.0);
  for (int64_t i = drawing.tile_starts[number]; i < drawing.tile_starts[number + 1]; ++i) {
    const int64_t entry = drawing.entries[i];
    if (entry >= 0) {
      const int32_t* v = drawing.face(entry);
      const Snapped corners[3] = {drawing.vertices[v[0]], drawing.vertices[v[1]], drawing.vertices[v[2]]};
      draw(corners, entry, drawing.screen, lanes, tile);
    } else {
      const Piece& piece = drawing.pieces[(-1 - entry) >> 32][(-1 - entry) & 0xffffffff];
      draw(piece.corners, piece.face, drawing.screen, lanes, tile);
    }
  }
}

// The corners of up to kPerVector pixels' triangles, side by side; a pixel without one has zeros.
struct Gathered {
  double x[3][kPerVector], y[3][kPerVector], z[3][kPerVector], w[3][kPerVector];

  void put(int lane, const float* pos, const int32_t* face) {
    for (int k = 0; k < 3; ++k) {
      const float* p = face == nullptr ? kZeros : pos + 4 * int64_t(face[k]);
      x[k][lane] = p[0];
      y[k][lane] = p[1];
      z[k][lane] = p[2];
      w[k][lane] = p[3];
    }
  }
  void get(PixelTriangle<VecD>* triangle) const {
    for (int k = 0; k < 3; ++k) {
      triangle->x[k] = load_doubles(x[k]);
      triangle->y[k] = load_doubles(y[k]);
      triangle->z[k] = load_doubles(z[k]);
      triangle->w[k] = load_doubles(w[k]);
    }
  }
  static constexpr float kZeros[4] = {0, 0, 0, 0};
};

VecD places(int first, const Lanes& lanes, double scale) { return (first + 0.5 + lanes.nth) * scale - 1.0; }

// Pixels [x, x + n) of row y, whose ids are given.
void write_pixels(const Drawing& drawing, const double* ids, int x, int y, int n, const Lanes& lanes, float* rast,
                  float* rast_db) {
  Gathered gathered;
  double any = 0;
  for (int i = 0; i < kPerVector; ++i) {
    const double id = i < n ? ids[i] : 0;
    gathered.put(i, drawing.pos, id == 0 ? nullptr : drawing.face(int64_t(id) - 1));
    any += id;
  }
  const int64_t at = 4 * (int64_t(y) * drawing.screen.width + x);
  if (any == 0) {
    std::fill(rast + at, rast + at + 4 * n, 0.0f);
    std::fill(rast_db + at, rast_db + at + 4 * n, 0.0f);
    return;
  }
  const double scale_x = 2.0 / drawing.screen.width, scale_y = 2.0 / drawing.screen.height;
  PixelTriangle<VecD> triangle;
  gathered.get(&triangle);
  triangle.set(places(x, lanes, scale_x), ((y + 0.5) * scale_y - 1.0) - VecD{});
  const PixelOutputs<VecD> out = outputs_of(triangle, scale_x, scale_y);
  for (int i = 0; i < n; ++i) {
    const float row[4] = {float(out.u[i]), float(out.v[i]), float(out.depth[i]), float(ids[i])};
    const float row_db[4] = {float(out.db[0][i]), float(out.db[1][i]), float(out.db[2][i]), float(out.db[3][i])};
    std::memcpy(rast + at + 4 * i, row, sizeof row);
    std::memcpy(rast_db + at + 4 * i, row_db, sizeof row_db);
  }
}

void draw_image(const Drawing& drawing, float* rast, float* rast_db, int n_threads) {
#pragma omp parallel num_threads(n_threads)
  {
    const Lanes lanes;
    Tile tile;
#pragma omp for schedule(dynamic, 1)
    for (int number = 0; number < drawing.n_tiles; ++number) {
      draw_tile(drawing, number, lanes, &tile);
      const int x1 = std::min(tile.x0 + kTile, drawing.screen.width);
      const int y1 = std::min(tile.y0 + kTile, drawing.screen.height);
      for (int y = tile.y0; y < y1; ++y) {
        const double* ids = tile.id + int64_t(y - tile.y0) * kRow;
        for (int x = tile.x0; x < x1; x += kPerVector) {
          write_pixels(drawing, ids + (x - tile.x0), x, y, std::min(kPerVector, x1 - x), lanes, rast, rast_db);
        }
      }
    }
  }
}

constexpr int64_t kPassPixels = 1 << 16;  // whose gradients are held at a time

// What pixels have to add to their triangles' corners: x, y and w of three corners.
struct PassGradients {
  std::vector<int32_t> corners;  // [pixels, 3], -1 for background
  std::vector<float> d;          // [pixels, 3, 3]
  PassGradients() : corners(3 * kPassPixels), d(9 * kPassPixels) {}
};

constexpr int32_t kNobody[3] = {-1, -1, -1};

struct Cotangents {
  const float *rast, *d_rast, *d_db;  // of this image

  // n numbers from channel `channel` on, of up to kPerVector pixels from `at` on; zeros where there are none.
  static void get(const float* from, int64_t at, int n_pixels, int n, VecD* d) {
    double numbers[4][kPerVector] = {};
    for (int i = 0; i < n_pixels && from != nullptr; ++i) {
      for (int c = 0; c < n; ++c) numbers[c][i] = from[4 * (at + i) + c];
    }
    for (int c = 0; c < n; ++c) d[c] = load_doubles(numbers[c]);
  }
};

// Gradients of n pixels of one row from pixel `at` of the image on, to row `slot` of the pass.
void pixel_gradients(const Meshes& meshes, const float* pos, const Cotangents& given, int64_t at, int n, int64_t slot,
                     const Lanes& lanes, PassGradients* pass) {
  Gathered gathered;
  int bad = 0, n_covered = 0;
  for (int i = 0; i < kPerVector; ++i) {
    int32_t corners[3] = {-1, -1, -1};
    const bool covered =
        i < n && corners_of(given.rast[4 * (at + i) + 3], meshes.tri, meshes.n_faces, meshes.n_vertices, corners, &bad);
    gathered.put(i, pos, covered ? corners : nullptr);
    n_covered += covered;
    if (i < n) std::memcpy(&pass->corners[3 * (slot + i)], covered ? corners : kNobody, sizeof corners);
  }
  if (n_covered == 0) return;
  const int y = int(at / meshes.width), x = int(at % meshes.width);
  const double scale_x = 2.0 / meshes.width, scale_y = 2.0 / meshes.height;
  const VecD place_x = places(x, lanes, scale_x), place_y = ((y + 0.5) * scale_y - 1.0) - VecD{};
  PixelTriangle<VecD> triangle;
  gathered.get(&triangle);
  triangle.set(place_x, place_y);
  VecD d_uv[2], d_db[4], d[3][3];
  Cotangents::get(given.d_rast, at, n, 2, d_uv);
  Cotangents::get(given.d_db, at, n, 4, d_db);
  corner_gradients(triangle, place_x, place_y, scale_x, scale_y, d_uv, d_db, d);
  for (int i = 0; i < n; ++i) {
    float* row = &pass->d[9 * (slot + i)];
    for (int c = 0; c < 9; ++c) row[c] = float(d[c / 3][c % 3][i]);
  }
}

void add_own(const PassGradients& pass, int64_t n, const Owner& owner, double* sums) {
  for (int64_t i = 0; i < 3 * n; ++i) {
    const int64_t v = pass.corners[i];
    if (v < 0 || !owner.has(v)) continue;
    for (int c = 0; c < 3; ++c) sums[3 * v + c] += pass.d[3 * i + c];
  }
}

void image_gradients(const Meshes& meshes, const float* pos, const Cotangents& given, float* d_pos, double* sums,
                     PassGradients* pass, int n_threads) {
  const int64_t rows = std::max(int64_t(1), kPassPixels / meshes.width);  // a row is at most 2^14
#pragma omp parallel num_threads(n_threads)
  {
    const Lanes lanes;
    const Owner owner;
#pragma omp for schedule(static)
    for (int64_t i = 0; i < 3 * meshes.n_vertices; ++i) sums[i] = 0;
    for (int64_t first = 0; first < meshes.height; first += rows) {
      const int64_t end = std::min(first + rows, int64_t(meshes.height)), start = first * meshes.width;
#pragma omp for schedule(static)
      for (int64_t y = first; y < end; ++y) {
        for (int64_t x = 0; x < meshes.width; x += kPerVector) {
          const int64_t at = y * meshes.width + x;
          const int n = int(std::min(int64_t(kPerVector), meshes.width - x));
          pixel_gradients(meshes, pos, given, at, n, at - start, lanes, pass);
        }
      }
      add_own(*pass, end * meshes.width - start, owner, sums);
#pragma omp barrier
    }
#pragma omp for schedule(static)
    for (int64_t v = 0; v < meshes.n_vertices; ++v) {
      const float row[4] = {float(sums[3 * v]), float(sums[3 * v + 1]), 0, float(sums[3 * v + 2])};
      std::memcpy(d_pos + 4 * v, row, sizeof row);
    }
  }
}

}  // namespace

int rasterize_forward(const Meshes& meshes, float* rast, float* rast_db, int n_threads) {
  Drawing drawing(meshes);
  const int64_t image = 4 * int64_t(meshes.height) * meshes.width;
  for (int64_t b = 0; b < meshes.n_images; ++b) {
    drawing.pos = meshes.pos + b * meshes.n_vertices * 4;
    if (snap_vertices(&drawing, n_threads)) return kNotFinite;
    if (sort_into_tiles(&drawing, n_threads)) return kNoVertex;
    draw_image(drawing, rast + b * image, rast_db + b * image, n_threads);
  }
  return kRasterFine;
}

void rasterize_backward(const Meshes& meshes, const float* rast, const float* d_rast, const float* d_db, float* d_pos,
                        int n_threads) {
  std::vector<double> sums(3 * meshes.n_vertices);
  PassGradients pass;
  const int64_t image = 4 * int64_t(meshes.height) * meshes.width;
  for (int64_t b = 0; b < meshes.n_images; ++b) {
    const int64_t mesh = b * meshes.n_vertices * 4;
    const Cotangents given{rast + b * image, d_rast ? d_rast + b * image : nullptr, d_db ? d_db + b * image : nullptr};
    image_gradients(meshes, meshes.pos + mesh, given, d_pos + mesh, sums.data(), &pass, n_threads);
  }
}

}  // namespace MVDREAM_FAST_ISA
}  // namespace mvdream_fast
