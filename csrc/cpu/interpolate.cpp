// interpolate on CPUs: each pixel blends the attributes at its triangle's corners.
#include "interpolate.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "cpu/scatter.h"
#include "cpu/shapes.h"

namespace mvdream_fast {
namespace MVDREAM_FAST_ISA {
namespace {

constexpr int64_t kBlock = 1024;          // pixels of one thread at a time
constexpr int64_t kPassPixels = 1 << 16;  // whose corners are held at a time

// Pixels [first, end) of one image: the gradients of u, v and their slopes, and the corners, -1 for background.
void pass_pixels(const Attributes& args, const Gradients& all, int64_t image, int64_t first, int64_t end,
                 int32_t* pass_corners) {
#pragma omp for schedule(static)
  for (int64_t p = first; p < end; ++p) {
    int32_t corners[3], *kept = pass_corners + 3 * (p - first);
    float *d_rast = all.d_rast ? all.d_rast + 4 * p : nullptr, *d_db = all.d_db ? all.d_db + 4 * p : nullptr;
    int bad = 0;
    if (corners_at(args, p, corners, &bad)) {
      std::memcpy(kept, corners, sizeof corners);
      if (d_rast || d_db) coordinate_gradients(args, Rows(args, image, corners), all.at(args, p), d_rast, d_db);
    } else {
      kept[0] = kept[1] = kept[2] = -1;
      if (d_rast) std::fill(d_rast, d_rast + 4, 0.0f);
      if (d_db) std::fill(d_db, d_db + 4, 0.0f);
    }
  }
}

}  // namespace

int interpolate_forward(const Attributes& args, float* out, float* out_da, int n_threads) {
  int any_bad = 0;
  const int64_t total = args.n_images * args.n_pixels;
#pragma omp parallel for schedule(static) num_threads(n_threads) reduction(| : any_bad)
  for (int64_t start = 0; start < total; start += kBlock) {
    int bad = 0;
    for (int64_t p = start; p < std::min(start + kBlock, total); ++p) {
      int32_t corners[3];
      float *row = out + p * args.n_attr, *row_da = out_da + p * 2 * args.n_diff;
      if (corners_at(args, p, corners, &bad)) {
        blend(args, Rows(args, p / args.n_pixels, corners), p, row, row_da);
      } else {
        std::fill(row, row + args.n_attr, 0.0f);
        std::fill(row_da, row_da + 2 * args.n_diff, 0.0f);
      }
    }
    any_bad |= bad;
  }
  return any_bad ? kNoFace : kRasterFine;
}

void interpolate_backward(const Attributes& args, const float* d_out, const float* d_out_da, float* d_attr,
                          float* d_rast, float* d_db, int n_threads) {
  const Gradients all{d_out, d_out_da, d_attr, d_rast, d_db};
  const int64_t n_sums = d_attr ? args.n_vertices * args.n_attr : 0;
  std::vector<double> sums(n_sums);
  std::vector<int32_t> corners(3 * kPassPixels);
#pragma omp parallel num_threads(n_threads)
  {
    const Owner owner;
    for (int64_t image = 0; image < args.n_images; ++image) {
      const int64_t start = image * args.n_pixels;
      for (int64_t first = start; first < start + args.n_pixels; first += kPassPixels) {
        const int64_t end = std::min(first + kPassPixels, start + args.n_pixels);
        pass_pixels(args, all, image, first, end, corners.data());
        for (int64_t i = 0; i < 3 * (end - first) && d_attr != nullptr; ++i) {
          const int64_t v = corners[i], pixel = first + i / 3;
          if (v >= 0 && owner.has(v)) {
            double* to = &sums[v * args.n_attr];
            visit_corner(args, pixel, int(i % 3), all.at(args, pixel), [=](int c, double d) { to[c] += d; });
          }
        }
#pragma omp barrier
      }
      if (args.stride == 0 && image + 1 < args.n_images) continue;  // one sum over all images
#pragma omp for schedule(static)
      for (int64_t i = 0; i < n_sums; ++i) {
        d_attr[image * args.stride + i] = float(sums[i]);
        sums[i] = 0;
      }
    }
  }
}

}  // namespace MVDREAM_FAST_ISA
}  // namespace mvdream_fast
