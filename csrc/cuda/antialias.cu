// antialias on GPUs: a thread follows a triangle's outlines, the nearest at each pair of pixels is a minimum of 64-bit
// keys, which no order of the threads changes; then a thread takes a pixel to blend it.
#include "antialias.h"
#include "cuda/sums.cuh"

namespace mvdream_fast::cuda {
namespace {

using namespace device;

constexpr int kThreads = 128;
constexpr unsigned long long kNobody = ~0ull;

// A pixel counted through all images.
struct Pixel {
  int64_t image, start;  // start: of its image's pixels
  int x, y;
  __device__ Pixel(const Meshes& meshes, int64_t pixel) {
    const int64_t of_image = int64_t(meshes.height) * meshes.width;
    image = pixel / of_image;
    start = image * of_image;
    x = static_cast<int>(pixel % meshes.width);
    y = static_cast<int>(pixel % of_image / meshes.width);
  }
};

int64_t n_pixels_of(const Silhouettes& args) { return args.meshes.n_images * args.meshes.height * args.meshes.width; }

__global__ void __launch_bounds__(kThreads) outlines_kernel(Silhouettes args, unsigned long long* keys) {
  const int64_t n_pairs = 2 * int64_t(args.meshes.height) * args.meshes.width;
  for (int64_t i = thread_index(); i < args.meshes.n_images * args.meshes.n_faces; i += n_threads()) {
    const int64_t image = i / args.meshes.n_faces;
    int bad = 0;
    visit_outlines(outlines_of(args, image), i % args.meshes.n_faces, &bad, [&](int64_t pair, uint64_t key) {
      atomicMin(keys + image * n_pairs + pair, static_cast<unsigned long long>(key));
    });
  }
}

__global__ void __launch_bounds__(kThreads) kept_kernel(int64_t n, const unsigned long long* keys, int32_t* crossings) {
  for (int64_t i = thread_index(); i < n; i += n_threads()) crossings[i] = keys[i] == kNobody ? 0 : kept_of(keys[i]);
}

__global__ void __launch_bounds__(kThreads)
    take_kernel(Silhouettes args, int64_t n, const float* color, const int32_t* crossings, float* out) {
  const int channels = args.n_channels;
  for (int64_t i = thread_index(); i < n; i += n_threads()) {
    const Pixel pixel(args.meshes, i);
    const float *from = color + pixel.start * channels, *own = color + i * channels;
    float* to = out + i * channels;
    for (int c = 0; c < channels; ++c) to[c] = own[c];
    visit_pairs(outlines_of(args, pixel.image), crossings + 2 * pixel.start, pixel.x, pixel.y,
                [&](int64_t other, float takes, float) {
                  for (int c = 0; c < channels; ++c) to[c] += takes * (from[other * channels + c] - own[c]);
                });
  }
}

__global__ void __launch_bounds__(kThreads)
    colors_kernel(Silhouettes args, int64_t n, const int32_t* crossings, const float* d_out, float* d_color) {
  const int channels = args.n_channels;
  for (int64_t i = thread_index(); i < n; i += n_threads()) {
    const Pixel pixel(args.meshes, i);
    const float *from = d_out + pixel.start * channels, *own = d_out + i * channels;
    float* to = d_color + i * channels;
    for (int c = 0; c < channels; ++c) to[c] = own[c];
    visit_pairs(outlines_of(args, pixel.image), crossings + 2 * pixel.start, pixel.x, pixel.y,
                [&](int64_t other, float takes, float gives) {
                  for (int c = 0; c < channels; ++c) to[c] += gives * from[other * channels + c] - takes * own[c];
                });
  }
}

__global__ void __launch_bounds__(kThreads) corners_kernel(Silhouettes args, int64_t n, const float* color,
                                                           const int32_t* crossings, const float* d_out, Sink sink) {
  for (int64_t i = thread_index(); i < 2 * n; i += n_threads()) {
    if (crossings[i] == 0) continue;
    const Pixel pixel(args.meshes, i / 2);
    const int64_t first = pixel.image * args.meshes.n_vertices, colors = pixel.start * args.n_channels;
    pair_gradients(outlines_of(args, pixel.image), color + colors, d_out + colors, args.n_channels, pixel.x, pixel.y,
                   static_cast<int>(i % 2), crossings[i], [&](int32_t corner, const double* d) {
                     sink.add(4 * (first + corner), d[0]);
                     sink.add(4 * (first + corner) + 1, d[1]);
                     sink.add(4 * (first + corner) + 3, d[2]);
                   });
  }
}

}  // namespace

int antialias_forward(const Silhouettes& args, const float* color, int32_t* crossings, float* out, Queue queue) {
  const DeviceGuard guard(queue.device);
  const char* name = "antialias forward";
  const int64_t n = n_pixels_of(args);
  const int64_t n_faces = args.meshes.n_images * args.meshes.n_faces;
  const Scratch<unsigned long long> keys(2 * n, queue.stream);
  if (n > 0) check(cudaMemsetAsync(keys.get(), 0xff, 2 * n * sizeof(kNobody), queue.stream), name);
  launch(name, outlines_kernel, blocks_for(n_faces, kThreads), kThreads, 0, queue.stream, args, keys.get());
  launch(name, kept_kernel, blocks_for(2 * n, kThreads), kThreads, 0, queue.stream, 2 * n, keys.get(), crossings);
  launch(name, take_kernel, blocks_for(n, kThreads), kThreads, 0, queue.stream, args, n, color, crossings, out);
  return kRasterFine;
}

void antialias_backward(const Silhouettes& args, const float* color, const int32_t* crossings, const float* d_out,
                        float* d_color, float* d_pos, Queue queue) {
  const DeviceGuard guard(queue.device);
  const char* name = "antialias backward";
  const int64_t n = n_pixels_of(args);
  if (d_color) {
    launch(name, colors_kernel, blocks_for(n, kThreads), kThreads, 0, queue.stream, args, n, crossings, d_out, d_color);
  }
  if (d_pos == nullptr) return;
  summed(name, 4 * args.meshes.n_images * args.meshes.n_vertices, 2 * n, d_pos, queue, [&](Sink sink) {
    launch(name, corners_kernel, blocks_for(2 * n, kThreads), kThreads, 0, queue.stream, args, n, color, crossings,
           d_out, sink);
  });
}

}  // namespace mvdream_fast::cuda
