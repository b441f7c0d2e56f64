// Every triangle at every pixel centre that it covers, seen or not: for what blends, and for what may have holes.
#include <algorithm>

#include "cpu/shapes.h"
#include "rasterize.h"

namespace mvdream_fast {
namespace MVDREAM_FAST_ISA {
namespace {

constexpr int64_t kFacesAtOnce = 64;

// Calls visit(x, y) for the pixels of one triangle on the screen.
template <typename Visit>
void visit_pixels(const Snapped& a, const Snapped& b, const Snapped& c, const Viewport& screen, Visit visit) {
  const Box box = box_of(a, b, c, screen);
  Edges edges;
  if (box.x0 > box.x1 || box.y0 > box.y1 || !set_edges(a, b, c, box.x0, box.y0, &edges)) return;
  for (int y = box.y0; y <= box.y1; ++y) {
    for (int x = box.x0; x <= box.x1; ++x) {
      bool inside = true;
      for (int k = 0; k < 3; ++k) {
        inside &= edges.at[k] + edges.step_x[k] * (x - box.x0) + edges.step_y[k] * (y - box.y0) >= 0;
      }
      if (inside) visit(x, y);
    }
  }
}

// The pixels of a face, of which those at the edge of what can be seen are cut.
template <typename Visit>
void visit_face(const Meshes& meshes, int64_t face, Visit visit) {
  const Viewport screen{meshes.width, meshes.height};
  Corner corners[3];
  Snapped polygon[kMostCorners];
  for (int k = 0; k < 3; ++k) corners[k] = corner_of(meshes.pos + 4 * int64_t(meshes.tri[3 * face + k]));
  const int n = clip(corners, screen, polygon);
  for (int k = 2; k < n; ++k) visit_pixels(polygon[0], polygon[k - 1], polygon[k], screen, visit);
}

}  // namespace

int fragment_counts(const Meshes& meshes, int64_t* counts, int n_threads) {
  int not_finite = 0, no_vertex = 0;
#pragma omp parallel for schedule(static) num_threads(n_threads) reduction(| : not_finite)
  for (int64_t v = 0; v < meshes.n_vertices; ++v) not_finite |= !is_finite(corner_of(meshes.pos + 4 * v));
  if (not_finite) return kNotFinite;
#pragma omp parallel for schedule(dynamic, kFacesAtOnce) num_threads(n_threads) reduction(| : no_vertex)
  for (int64_t face = 0; face < meshes.n_faces; ++face) {
    const int32_t* v = meshes.tri + 3 * face;
    counts[face] = 0;
    if (std::min({v[0], v[1], v[2]}) < 0 || std::max({v[0], v[1], v[2]}) >= meshes.n_vertices) {
      no_vertex = 1;
    } else {
      visit_face(meshes, face, [&](int, int) { ++counts[face]; });
    }
  }
  return no_vertex ? kNoVertex : kRasterFine;
}

void fragment_fill(const Meshes& meshes, const Fragments& out, int n_threads) {
  const double scale_x = 2.0 / meshes.width, scale_y = 2.0 / meshes.height;
#pragma omp parallel for schedule(dynamic, kFacesAtOnce) num_threads(n_threads)
  for (int64_t face = out.first_face; face < out.end_face; ++face) {
    int64_t at = out.starts[face] - out.starts[out.first_face];
    visit_face(meshes, face, [&](int x, int y) {
      PixelTriangle<double> triangle;
      for (int k = 0; k < 3; ++k) {
        const float* p = meshes.pos + 4 * int64_t(meshes.tri[3 * face + k]);
        triangle.x[k] = p[0];
        triangle.y[k] = p[1];
        triangle.z[k] = p[2];
        triangle.w[k] = p[3];
      }
      triangle.set((x + 0.5) * scale_x - 1, (y + 0.5) * scale_y - 1);
      const PixelOutputs<double> pixel = outputs_of(triangle, scale_x, scale_y);
      out.face[at] = face;
      out.pixel[at] = int64_t(y) * meshes.width + x;
      out.values[3 * at] = float(pixel.u);
      out.values[3 * at + 1] = float(pixel.v);
      out.values[3 * at + 2] = float(pixel.depth);
      ++at;
    });
  }
}

}  // namespace MVDREAM_FAST_ISA
}  // namespace mvdream_fast
