// rasterize on GPUs: a warp takes a face and tries the pixels of its box, the nearest face of each pixel is a minimum
// of 64-bit keys (depth, then face), which no order of the warps changes; then a thread writes each pixel.
#include "cuda/sums.cuh"
#include "rasterize.h"

namespace mvdream_fast::cuda {
namespace {

using namespace device;

constexpr int kThreads = 128;
constexpr unsigned long long kNobody = ~0ull;

struct Vertex {
  Snapped at;
  int whole;  // 1: needs no clipping, 0: may, -1: is no number
};

__global__ void vertices_kernel(Meshes meshes, Vertex* vertices) {
  const Viewport screen{meshes.width, meshes.height};
  for (int64_t i = thread_index(); i < meshes.n_images * meshes.n_vertices; i += n_threads()) {
    const Corner corner = corner_of(meshes.pos + 4 * i);
    Vertex vertex = {{0, 0, 0}, !is_finite(corner) ? -1 : needs_no_clipping(corner, screen) ? 1 : 0};
    if (vertex.whole == 1) vertex.at = snap(corner, screen);
    vertices[i] = vertex;
  }
}

// 40 bits of depth above the face's number.
__device__ unsigned long long key_of(double depth, int64_t face) {
  const double rounded = (depth + kDepthRounding) - kDepthRounding, steps = (rounded + 1) * 549755813888.0;
  const double most = 1099511627775.0;
  const auto high = static_cast<unsigned long long>(steps < 0 ? 0 : steps > most ? most : steps);
  return high << 24 | static_cast<unsigned long long>(face);
}

__device__ void draw(const Snapped& a, const Snapped& b, const Snapped& c, const Viewport& screen, int64_t face,
                     unsigned long long* keys) {
  const Box box = box_of(a, b, c, screen);
  Edges edges;
  if (box.x0 > box.x1 || box.y0 > box.y1 || !set_edges(a, b, c, box.x0, box.y0, &edges)) return;
  const int64_t across = box.x1 - box.x0 + 1, n = across * (box.y1 - box.y0 + 1);
  for (int64_t i = lane_index(); i < n; i += kWarp) {
    const int dx = static_cast<int>(i % across), dy = static_cast<int>(i / across), x = box.x0 + dx, y = box.y0 + dy;
    bool inside = true;
    for (int k = 0; k < 3; ++k) inside &= edges.at[k] + (edges.step_x[k] * dx + edges.step_y[k] * dy) >= 0;
    if (!inside) continue;
    const double depth = edges.depth + edges.depth_y * (y - edges.origin_y) + edges.depth_x * (x - edges.origin_x);
    atomicMin(keys + int64_t(y) * screen.width + x, key_of(depth, face));
  }
}

__global__ void __launch_bounds__(kThreads)
    faces_kernel(Meshes meshes, const Vertex* vertices, unsigned long long* keys) {
  const Viewport screen{meshes.width, meshes.height};
  for (int64_t i = warp_index(); i < meshes.n_images * meshes.n_faces; i += n_warps()) {
    const int64_t image = i / meshes.n_faces, face = i % meshes.n_faces;
    unsigned long long* own = keys + image * meshes.height * meshes.width;
    const int32_t* v = meshes.tri + 3 * face;
    Vertex at[3];
    bool there = true, whole = true;
    for (int k = 0; k < 3; ++k) {
      there = there && v[k] >= 0 && v[k] < meshes.n_vertices;
      if (there) at[k] = vertices[image * meshes.n_vertices + v[k]];
      there = there && at[k].whole >= 0;
      whole = whole && there && at[k].whole == 1;
    }
    if (!there) continue;
    if (whole) {
      draw(at[0].at, at[1].at, at[2].at, screen, face, own);
      continue;
    }
    Corner corners[3];
    Snapped polygon[kMostCorners];
    for (int k = 0; k < 3; ++k) corners[k] = corner_of(meshes.pos + 4 * (image * meshes.n_vertices + v[k]));
    const int n = clip(corners, screen, polygon);
    for (int k = 2; k < n; ++k) draw(polygon[0], polygon[k - 1], polygon[k], screen, face, own);
  }
}

// The triangle that a pixel shows, as seen from the pixel.
struct Place {
  double x, y, scale_x, scale_y;
  int64_t image;
  __device__ Place(const Meshes& meshes, int64_t pixel) {
    const int64_t of_image = int64_t(meshes.height) * meshes.width;
    image = pixel / of_image;
    scale_x = 2.0 / meshes.width;
    scale_y = 2.0 / meshes.height;
    x = (pixel % meshes.width + 0.5) * scale_x - 1;
    y = (pixel % of_image / meshes.width + 0.5) * scale_y - 1;
  }
};

__device__ PixelTriangle<double> triangle_at(const Meshes& meshes, const Place& place, const int32_t* corners) {
  PixelTriangle<double> triangle;
  for (int k = 0; k < 3; ++k) {
    const Corner corner = corner_of(meshes.pos + 4 * (place.image * meshes.n_vertices + corners[k]));
    triangle.x[k] = corner.x;
    triangle.y[k] = corner.y;
    triangle.z[k] = corner.z;
    triangle.w[k] = corner.w;
  }
  triangle.set(place.x, place.y);
  return triangle;
}

__global__ void __launch_bounds__(kThreads)
    pixels_kernel(Meshes meshes, const unsigned long long* keys, float* rast, float* rast_db) {
  const int64_t n = meshes.n_images * meshes.height * meshes.width;
  for (int64_t pixel = thread_index(); pixel < n; pixel += n_threads()) {
    float4 values = {0, 0, 0, 0}, slopes = {0, 0, 0, 0};
    if (keys[pixel] != kNobody) {
      const int64_t face = static_cast<int64_t>(keys[pixel] & 0xffffff);
      const Place place(meshes, pixel);
      const auto triangle = triangle_at(meshes, place, meshes.tri + 3 * face);
      const PixelOutputs<double> out = outputs_of(triangle, place.scale_x, place.scale_y);
      values = {float(out.u), float(out.v), float(out.depth), float(face + 1)};
      slopes = {float(out.db[0]), float(out.db[1]), float(out.db[2]), float(out.db[3])};
    }
    reinterpret_cast<float4*>(rast)[pixel] = values;
    reinterpret_cast<float4*>(rast_db)[pixel] = slopes;
  }
}

__global__ void __launch_bounds__(kThreads)
    pull_kernel(Meshes meshes, const float* rast, const float* d_rast, const float* d_db, Sink sink) {
  const int64_t n = meshes.n_images * meshes.height * meshes.width;
  for (int64_t pixel = thread_index(); pixel < n; pixel += n_threads()) {
    int32_t corners[3];
    int bad = 0;
    if (!corners_of(rast[4 * pixel + 3], meshes.tri, meshes.n_faces, meshes.n_vertices, corners, &bad)) continue;
    double d_uv[2] = {0, 0}, d_slopes[4] = {0, 0, 0, 0}, d[3][3];
    for (int k = 0; k < 2 && d_rast; ++k) d_uv[k] = d_rast[4 * pixel + k];
    for (int k = 0; k < 4 && d_db; ++k) d_slopes[k] = d_db[4 * pixel + k];
    const Place place(meshes, pixel);
    const auto triangle = triangle_at(meshes, place, corners);
    corner_gradients(triangle, place.x, place.y, place.scale_x, place.scale_y, d_uv, d_slopes, d);
    for (int k = 0; k < 3; ++k) {
      const int64_t to = 4 * (place.image * meshes.n_vertices + corners[k]);
      sink.add(to, d[k][0]);
      sink.add(to + 1, d[k][1]);
      sink.add(to + 3, d[k][2]);
    }
  }
}

}  // namespace

int rasterize_forward(const Meshes& meshes, float* rast, float* rast_db, Queue queue) {
  const DeviceGuard guard(queue.device);
  const char* name = "rasterize forward";
  const int64_t n_vertices = meshes.n_images * meshes.n_vertices, n_faces = meshes.n_images * meshes.n_faces;
  const int64_t n_pixels = meshes.n_images * meshes.height * meshes.width;
  const Scratch<Vertex> vertices(n_vertices, queue.stream);
  const Scratch<unsigned long long> keys(n_pixels, queue.stream);
  if (n_pixels > 0) check(cudaMemsetAsync(keys.get(), 0xff, n_pixels * sizeof(kNobody), queue.stream), name);
  launch(name, vertices_kernel, blocks_for(n_vertices, kThreads), kThreads, 0, queue.stream, meshes, vertices.get());
  launch(name, faces_kernel, blocks_for(n_faces, kThreads / kWarp), kThreads, 0, queue.stream, meshes, vertices.get(),
         keys.get());
  launch(name, pixels_kernel, blocks_for(n_pixels, kThreads), kThreads, 0, queue.stream, meshes, keys.get(), rast,
         rast_db);
  return kRasterFine;
}

void rasterize_backward(const Meshes& meshes, const float* rast, const float* d_rast, const float* d_db, float* d_pos,
                        Queue queue) {
  const DeviceGuard guard(queue.device);
  const char* name = "rasterize backward";
  const int64_t n_pixels = meshes.n_images * meshes.height * meshes.width;
  summed(name, 4 * meshes.n_images * meshes.n_vertices, n_pixels, d_pos, queue, [&](Sink sink) {
    launch(name, pull_kernel, blocks_for(n_pixels, kThreads), kThreads, 0, queue.stream, meshes, rast, d_rast, d_db,
           sink);
  });
}

}  // namespace mvdream_fast::cuda
