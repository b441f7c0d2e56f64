// antialias on CPUs: crossings pair by pair, then each pixel takes from its neighbours.
#include "antialias.h"

#include <algorithm>
#include <vector>

#include "cpu/scatter.h"
#include "cpu/shapes.h"

namespace mvdream_fast {
namespace MVDREAM_FAST_ISA {
namespace {

// What a pair has to add to the x, y and w of its edge's corners.
struct EdgeGradient {
  int32_t corner;
  double d[3];
};

}  // namespace

int antialias_forward(const Silhouettes& args, const float* color, float* crossings, float* out, int n_threads) {
  const int height = args.meshes.height, width = args.meshes.width, channels = args.n_channels;
  const int64_t n_rows = args.meshes.n_images * height;
  int any_bad = 0;
#pragma omp parallel num_threads(n_threads) reduction(| : any_bad)
  {
    int bad = 0;
#pragma omp for schedule(static)
    for (int64_t row = 0; row < n_rows; ++row) {
      const Outlines image = outlines_of(args, row / height);
      for (int64_t i = 0; i < 2 * int64_t(width); ++i) {
        crossings[2 * row * width + i] = crossing_number(image, int(i / 2), int(row % height), int(i % 2), &bad);
      }
    }
#pragma omp for schedule(static)
    for (int64_t row = 0; row < n_rows; ++row) {
      const int64_t image = row / height * height * width;
      const float* from = color + image * channels;
      for (int x = 0; x < width; ++x) {
        float* to = out + (row * width + x) * channels;
        const float* own = color + (row * width + x) * channels;
        std::copy(own, own + channels, to);
        visit_pairs(crossings + 2 * image, x, int(row % height), width, height, [&](int64_t other, float takes, float) {
          for (int c = 0; c < channels; ++c) to[c] += takes * (from[other * channels + c] - own[c]);
        });
      }
    }
    any_bad |= bad;
  }
  return any_bad ? kNoFace : kRasterFine;
}

void antialias_backward(const Silhouettes& args, const float* color, const float* crossings, const float* d_out,
                        float* d_color, float* d_pos, int n_threads) {
  const int height = args.meshes.height, width = args.meshes.width, channels = args.n_channels;
  const int64_t n_images = args.meshes.n_images, n_rows = n_images * height;
  const int64_t n_sums = d_pos ? 3 * args.meshes.n_vertices : 0;
  std::vector<std::vector<EdgeGradient>> of_rows(n_rows);
  std::vector<double> sums(n_images * n_sums);
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
          visit_pairs(crossings + 2 * image, x, int(row % height), width, height, add);
        }
        for (int axis = 0; axis < (d_pos ? 2 : 0); ++axis) {
          const float crossing = crossings[2 * pixel + axis];
          if (crossing == 0) continue;
          const auto add = [&](int32_t corner, const double* d) {
            of_rows[row].push_back({corner, {d[0], d[1], d[2]}});
          };
          pair_gradients(outlines, color + image * channels, d_out + image * channels, channels, x, int(row % height),
                         axis, crossing, add);
        }
      }
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
}

}  // namespace MVDREAM_FAST_ISA
}  // namespace mvdream_fast
