// texture on CPUs: each pixel blends its texels.
#include "texture.h"

#include <algorithm>
#include <vector>

#include "cpu/scatter.h"
#include "cpu/shapes.h"

namespace mvdream_fast {
namespace MVDREAM_FAST_ISA {
namespace {

constexpr int64_t kPassPixels = 1 << 14;  // whose taps are held at a time

// A tap as the sums of the texels need it.
struct Part {
  int64_t texel;  // -1 for none
  float weight;
};

}  // namespace

void texture_forward(const Textured& args, float* out, int n_threads) {
#pragma omp parallel for schedule(static) num_threads(n_threads)
  for (int64_t pixel = 0; pixel < args.n_images * args.n_pixels; ++pixel) {
    Tap taps[kMostTaps];
    const float* tex = args.tex + pixel / args.n_pixels * args.stride;
    float* row = out + pixel * args.n_channels;
    std::fill(row, row + args.n_channels, 0.0f);
    const int n = pixel_taps(args, pixel, taps, nullptr);
    for (int k = 0; k < n; ++k) {
      const float weight = float(taps[k].weight), *texel = tex + taps[k].texel * args.n_channels;
      for (int c = 0; c < args.n_channels; ++c) row[c] += weight * texel[c];
    }
  }
}

void texture_backward(const Textured& args, const float* d_out, float* d_tex, float* d_uv, float* d_da, int n_threads) {
  const int channels = args.n_channels;
  const int64_t n_sums = d_tex ? (args.stride ? args.n_images : 1) * args.n_texels * channels : 0;
  std::vector<Part> parts(d_tex ? kMostTaps * kPassPixels : 0);
  const int64_t total = args.n_images * args.n_pixels;
#pragma omp parallel num_threads(n_threads)
  {
    const Owner owner;
#pragma omp for schedule(static)
    for (int64_t i = 0; i < n_sums; ++i) d_tex[i] = 0;
    for (int64_t first = 0; first < total; first += kPassPixels) {
      const int64_t end = std::min(first + kPassPixels, total);
#pragma omp for schedule(static)
      for (int64_t pixel = first; pixel < end; ++pixel) {
        Tap taps[kMostTaps];
        double slopes[4] = {};
        const int64_t start = pixel / args.n_pixels * args.stride;
        const int n = pixel_taps(args, pixel, taps, slopes);
        tap_gradients(args, args.tex + start, taps, n, slopes, d_out + pixel * channels,
                      d_uv ? d_uv + 2 * pixel : nullptr, d_da ? d_da + 4 * pixel : nullptr);
        for (int k = 0; k < kMostTaps && d_tex; ++k) {
          const bool here = k < n && taps[k].weight != 0;
          parts[kMostTaps * (pixel - first) + k] =
              here ? Part{start / channels + taps[k].texel, float(taps[k].weight)} : Part{-1, 0};
        }
      }
      for (int64_t i = 0; i < (d_tex ? kMostTaps * (end - first) : 0); ++i) {
        if (parts[i].texel < 0 || !owner.has(parts[i].texel)) continue;
        const float* d = d_out + (first + i / kMostTaps) * channels;
        float* sums = d_tex + parts[i].texel * channels;
        for (int c = 0; c < channels; ++c) sums[c] += parts[i].weight * d[c];
      }
#pragma omp barrier
    }
  }
}

}  // namespace MVDREAM_FAST_ISA
}  // namespace mvdream_fast
