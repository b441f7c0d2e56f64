// texture on GPUs: a thread takes a pixel.
#include "cuda/sums.cuh"
#include "texture.h"

namespace mvdream_fast::cuda {
namespace {

using namespace device;

constexpr int kThreads = 128;

__global__ void __launch_bounds__(kThreads) look_up_kernel(Textured args, float* out) {
  for (int64_t pixel = thread_index(); pixel < args.n_images * args.n_pixels; pixel += n_threads()) {
    Tap taps[kMostTaps];
    const float* tex = args.tex + pixel / args.n_pixels * args.stride;
    float* row = out + pixel * args.n_channels;
    const int n = pixel_taps(args, pixel, taps, nullptr);
    for (int c = 0; c < args.n_channels; ++c) {
      float sum = 0;
      for (int k = 0; k < n; ++k) sum += static_cast<float>(taps[k].weight) * tex[taps[k].texel * args.n_channels + c];
      row[c] = sum;
    }
  }
}

__global__ void __launch_bounds__(kThreads)
    coordinates_kernel(Textured args, const float* d_out, float* d_uv, float* d_da) {
  for (int64_t pixel = thread_index(); pixel < args.n_images * args.n_pixels; pixel += n_threads()) {
    Tap taps[kMostTaps];
    double slopes[4] = {0, 0, 0, 0};
    const int n = pixel_taps(args, pixel, taps, slopes);
    tap_gradients(args, args.tex + pixel / args.n_pixels * args.stride, taps, n, slopes,
                  d_out + pixel * args.n_channels, d_uv ? d_uv + 2 * pixel : nullptr,
                  d_da ? d_da + 4 * pixel : nullptr);
  }
}

__global__ void __launch_bounds__(kThreads) texels_kernel(Textured args, const float* d_out, Sink sink) {
  for (int64_t pixel = thread_index(); pixel < args.n_images * args.n_pixels; pixel += n_threads()) {
    Tap taps[kMostTaps];
    const int n = pixel_taps(args, pixel, taps, nullptr);
    const int64_t start = pixel / args.n_pixels * args.stride;
    for (int k = 0; k < n; ++k) {
      for (int c = 0; c < args.n_channels; ++c) {
        const double d = taps[k].weight * d_out[pixel * args.n_channels + c];
        sink.add(start + taps[k].texel * args.n_channels + c, d);
      }
    }
  }
}

}  // namespace

void texture_forward(const Textured& args, float* out, Queue queue) {
  const DeviceGuard guard(queue.device);
  launch("texture forward", look_up_kernel, blocks_for(args.n_images * args.n_pixels, kThreads), kThreads, 0,
         queue.stream, args, out);
}

void texture_backward(const Textured& args, const float* d_out, float* d_tex, float* d_uv, float* d_da, Queue queue) {
  const DeviceGuard guard(queue.device);
  const char* name = "texture backward";
  const int64_t n = args.n_images * args.n_pixels, blocks = blocks_for(n, kThreads);
  if (d_uv || d_da) launch(name, coordinates_kernel, blocks, kThreads, 0, queue.stream, args, d_out, d_uv, d_da);
  if (d_tex == nullptr) return;
  const int64_t n_sums = (args.stride ? args.n_images : 1) * args.n_texels * args.n_channels;
  summed(name, n_sums, n * kMostTaps, d_tex, queue,
         [&](Sink sink) { launch(name, texels_kernel, blocks, kThreads, 0, queue.stream, args, d_out, sink); });
}

}  // namespace mvdream_fast::cuda
