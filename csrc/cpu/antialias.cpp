// antialias on CPUs: crossings face by face, of which each pair of pixels keeps the nearest, then each pixel takes from
// its neighbours.
#include "antialias.h"

#include <algorithm>
#include <vector>

#include "cpu/scatter.h"
#include "cpu/shapes.h"
#include "cpu/thrown.h"

namespace mvdream_fast {
namespace MVDREAM_FAST_ISA {
namespace {

// What a pair has to add to the x, y and w of its edge's corners.
struct EdgeGradient {
  int32_t corner;
  double d[3];
};

struct Hit {
  int64_t pair;
  uint64_t key;
};

constexpr int64_t kFacesPerChunk = 4096;

// What is kept of each pair of an image, [H, W, 2]; whether a vertex is none.
int keep_nearest(const Outlines& image, int32_t* crossings, int n_threads) {
  const int64_t n_chunks = (image.n_faces + kFacesPerChunk - 1) / kFacesPerChunk;
  std::vector<std::vector<Hit>> of_chunks(n_chunks);
  int any_bad = 0;
  Thrown thrown;
#pragma omp parallel for schedule(dynamic, 1) num_threads(n_threads) reduction(| : any_bad)
  for (int64_t chunk = 0; chunk < n_chunks; ++chunk) {
    const int64_t end = std::min(image.n_faces, (chunk + 1) * kFacesPerChunk);
    const auto add = [&](int64_t pair, uint64_t key) { of_chunks[chunk].push_back({pair, key}); };
    int bad = 0;
    thrown.keep([&] {
      for (int64_t face = chunk * kFacesPerChunk; face < end; ++face) visit_outlines(image, face, &bad, add);
    });
    any_bad |= bad;
  }
  thrown.rethrow();
  std::fill(crossings, crossings + 2 * int64_t(image.height) * image.width, 0);
  std::vector<Hit> hits;
  for (const std::vector<Hit>& chunk : of_chunks) hits.insert(hits.end(), chunk.begin(), chunk.end());
  for (size_t i = 0; i < hits.size(); ++i) {  // first -1 - the number of the nearest, then what is kept of it
    int32_t& nearest = crossings[hits[i].pair];
    if (nearest == 0 || hits[i].key < hits[-1 - nearest].key) nearest = -1 - int32_t(i);
  }
  for (size_t i = 0; i < hits.size(); ++i) {
    int32_t& nearest = crossings[hits[i].pair];
    if (nearest == -1 - int32_t(i)) nearest = kept_of(hits[i].key);
  }
  return any_bad;
}

// What the pairs of a row of pixels [B * H] have to add.
void row_gradients(const Outlines& outlines, int64_t row, int channels, const float* color, const int32_t* crossings,
                   const float* d_out, std::vector<EdgeGradient>* out) {
  const int64_t image = row / outlines.height * outlines.height * outlines.width;
  const auto add = [&](int32_t corner, const double* d) { out->push_back({corner, {d[0], d[1], d[2]}}); };
  for (int x = 0; x < outlines.width; ++x) {
    for (int axis = 0; axis < 2; ++axis) {
      const int32_t crossing = crossings[2 * (row * outlines.width + x) + axis];
      if (crossing == 0) continue;
      pair_gradients(outlines, color + image * channels, d_out + image * channels, channels, x,
                     int(row % outlines.height), axis, crossing, add);
    }
  }
}

}  // namespace

int antialias_forward(const Silhouettes& args, const float* color, int32_t* crossings, float* out, int n_threads) {
  const int height = args.meshes.height, width = args.meshes.width, channels = args.n_channels;
  const int64_t n_rows = args.meshes.n_images * height;
  int any_bad = 0;
  for (int64_t image = 0; image < args.meshes.n_images; ++image) {
    any_bad |= keep_nearest(outlines_of(args, image), crossings + 2 * image * height * width, n_threads);
  }
#pragma omp parallel num_threads(n_threads) reduction(| : any_bad)
  {
    int bad = 0;
#pragma omp for schedule(static)
    for (int64_t row = 0; row < n_rows; ++row) {
      const int64_t image = row / height * height * width;
      const Outlines outlines = outlines_of(args, row / height);
      const float* from = color + image * channels;
      for (int x = 0; x < width; ++x) {
        float* to = out + (row * width + x) * channels;
        const float* own = color + (row * width + x) * channels;
        const float id = args.rast[4 * (row * width + x) + 3];
        bad |= !(id >= 0 && id <= static_cast<float>(args.meshes.n_faces));
        std::copy(own, own + channels, to);
        visit_pairs(outlines, crossings + 2 * image, x, int(row % height), [&](int64_t other, float takes, float) {
          for (int c = 0; c < channels; ++c) to[c] += takes * (from[other * channels + c] - own[c]);
        });
      }
    }
    any_bad |= bad;
  }
  return any_bad ? kNoFace : kRasterFine;
}

void antialias_backward(const Silhouettes& args, const float* color, const int32_t* crossings, const float* d_out,
                        float* d_color, float* d_pos, int n_threads) {
  const int height = args.meshes.height, width = args.meshes.width, channels = args.n_channels;
  const int64_t n_images = args.meshes.n_images, n_rows = n_images * height;
  const int64_t n_sums = d_pos ? 3 * args.meshes.n_vertices : 0;
  std::vector<std::vector<EdgeGradient>> of_rows(n_rows);
  std::vector<double> sums(n_images * n_sums);
  Thrown thrown;
#pragma omp parallel num_threads(n_threads)
  {
    const Owner owner;
#pragma omp for schedule(static)
    for (int64_t row = 0; row < n_rows; ++row) {
      const int64_t image = row / height * height * width;
      const Outlines outlines = outlines_of(args, row / height);
      for (int x = 0; x < width; ++x) {
        const int64_t pixel = row * width + x;
        const float* d = d_out + pixel * channels;
        if (d_color) {
          float* to = d_color + pixel * channels;
          std::copy(d, d + channels, to);
          const auto add = [&](int64_t other, float takes, float gives) {
            const float* d_other = d_out + (image + other) * channels;
            for (int c = 0; c < channels; ++c) to[c] += gives * d_other[c] - takes * d[c];
          };
          visit_pairs(outlines, crossings + 2 * image, x, int(row % height), add);
        }
      }
      if (d_pos) thrown.keep([&] { row_gradients(outlines, row, channels, color, crossings, d_out, &of_rows[row]); });
    }
    for (int64_t row = 0; row < n_rows; ++row) {
      double* of_image = sums.data() + row / height * n_sums;
      for (const EdgeGradient& gradient : of_rows[row]) {
        if (!owner.has(gradient.corner)) continue;
        for (int c = 0; c < 3; ++c) of_image[3 * int64_t(gradient.corner) + c] += gradient.d[c];
      }
    }
#pragma omp barrier
#pragma omp for schedule(static)
    for (int64_t v = 0; v < n_images * n_sums / 3; ++v) {
      const float row[4] = {float(sums[3 * v]), float(sums[3 * v + 1]), 0, float(sums[3 * v + 2])};
      std::copy(row, row + 4, d_pos + 4 * v);
    }
  }
  thrown.rethrow();
}

}  // namespace MVDREAM_FAST_ISA
}  // namespace mvdream_fast
