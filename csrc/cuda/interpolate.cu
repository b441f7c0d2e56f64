// interpolate on GPUs: a thread takes a pixel.
#include "cuda/sums.cuh"
#include "interpolate.h"

namespace mvdream_fast::cuda {
namespace {

using namespace device;

constexpr int kThreads = 128;

__global__ void __launch_bounds__(kThreads) blend_kernel(Attributes args, float* out, float* out_da) {
  for (int64_t p = thread_index(); p < args.n_images * args.n_pixels; p += n_threads()) {
    int32_t corners[3];
    int bad = 0;
    float *row = out + p * args.n_attr, *row_da = out_da + p * 2 * args.n_diff;
    if (corners_at(args, p, corners, &bad)) {
      blend(args, Rows(args, p / args.n_pixels, corners), p, row, row_da);
    } else {
      for (int c = 0; c < args.n_attr; ++c) row[c] = 0;
      for (int c = 0; c < 2 * args.n_diff; ++c) row_da[c] = 0;
    }
  }
}

__global__ void __launch_bounds__(kThreads) weights_kernel(Attributes args, Gradients all) {
  for (int64_t p = thread_index(); p < args.n_images * args.n_pixels; p += n_threads()) {
    int32_t corners[3];
    int bad = 0;
    float *d_rast = all.d_rast ? all.d_rast + 4 * p : nullptr, *d_db = all.d_db ? all.d_db + 4 * p : nullptr;
    if (corners_at(args, p, corners, &bad)) {
      coordinate_gradients(args, Rows(args, p / args.n_pixels, corners), all.at(args, p), d_rast, d_db);
      continue;
    }
    for (int k = 0; k < 4 && d_rast; ++k) d_rast[k] = 0;
    for (int k = 0; k < 4 && d_db; ++k) d_db[k] = 0;
  }
}

__global__ void __launch_bounds__(kThreads) attributes_kernel(Attributes args, Gradients all, Sink sink) {
  for (int64_t p = thread_index(); p < args.n_images * args.n_pixels; p += n_threads()) {
    int32_t corners[3];
    int bad = 0;
    if (!corners_at(args, p, corners, &bad)) continue;
    for (int k = 0; k < 3; ++k) {
      const int64_t to = p / args.n_pixels * args.stride + int64_t(corners[k]) * args.n_attr;
      visit_corner(args, p, k, all.at(args, p), [&](int c, double d) { sink.add(to + c, d); });
    }
  }
}

}  // namespace

int interpolate_forward(const Attributes& args, float* out, float* out_da, Queue queue) {
  const DeviceGuard guard(queue.device);
  launch("interpolate forward", blend_kernel, blocks_for(args.n_images * args.n_pixels, kThreads), kThreads, 0,
         queue.stream, args, out, out_da);
  return kRasterFine;
}

void interpolate_backward(const Attributes& args, const float* d_out, const float* d_out_da, float* d_attr,
                          float* d_rast, float* d_db, Queue queue) {
  const DeviceGuard guard(queue.device);
  const char* name = "interpolate backward";
  const Gradients all{d_out, d_out_da, d_attr, d_rast, d_db};
  const int64_t n = args.n_images * args.n_pixels, blocks = blocks_for(n, kThreads);
  if (d_rast || d_db) launch(name, weights_kernel, blocks, kThreads, 0, queue.stream, args, all);
  if (d_attr == nullptr) return;
  const int64_t n_sums = (args.stride ? args.n_images : 1) * args.n_vertices * args.n_attr;
  summed(name, n_sums, n * (1 + args.n_diff), d_attr, queue,
         [&](Sink sink) { launch(name, attributes_kernel, blocks, kThreads, 0, queue.stream, args, all, sink); });
}

}  // namespace mvdream_fast::cuda
