// The rasteriser's ops: rasterize, interpolate, antialias, texture. Addresses come as integers, 0 for none.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>

#include "cpu/shapes.h"

namespace py = pybind11;

namespace mvdream_fast {
namespace {

using Address = std::uintptr_t;
using NoGil = py::call_guard<py::gil_scoped_release>;

template <typename T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

Attributes attributes(Address attr, Address rast, Address rast_db, Address tri, Address diff_attrs,
                      std::array<int64_t, 5> sizes, int n_attr, int n_diff) {
  const auto [n_images, n_pixels, n_vertices, n_faces, stride] = sizes;
  return {at<float>(attr), at<float>(rast), at<float>(rast_db), at<int32_t>(tri), at<int32_t>(diff_attrs),
          n_images,        n_pixels,        n_vertices,         n_faces,          stride,
          n_attr,          n_diff};
}

void bind_interpolate(py::module_& m) {
  py::class_<Attributes>(m, "Attributes").def(py::init(&attributes));
  m.def(
      "interpolate_forward",
      [](const Attributes& args, Address out, Address out_da, int n_threads) {
        return MVDREAM_FAST_CPU(interpolate_forward)(args, at<float>(out), at<float>(out_da), n_threads);
      },
      NoGil());
  m.def(
      "interpolate_backward",
      [](const Attributes& args, Address d_out, Address d_out_da, Address d_attr, Address d_rast, Address d_db,
         int n_threads) {
        MVDREAM_FAST_CPU(interpolate_backward)
        (args, at<float>(d_out), at<float>(d_out_da), at<float>(d_attr), at<float>(d_rast), at<float>(d_db), n_threads);
      },
      NoGil());
}

void bind_antialias(py::module_& m) {
  m.def(
      "edge_topology",
      [](Address tri, int64_t n_faces, Address opposite, int n_threads) {
        MVDREAM_FAST_CPU(edge_topology)(at<int32_t>(tri), n_faces, at<int32_t>(opposite), n_threads);
      },
      NoGil());
  py::class_<Silhouettes>(m, "Silhouettes")
      .def(py::init([](const Meshes& meshes, Address rast, Address opposite, int n_channels) {
        return Silhouettes{meshes, at<float>(rast), at<int32_t>(opposite), n_channels};
      }));
  m.def(
      "antialias_forward",
      [](const Silhouettes& args, Address color, Address crossings, Address out, int n_threads) {
        return MVDREAM_FAST_CPU(antialias_forward)(args, at<float>(color), at<int32_t>(crossings), at<float>(out),
                                                   n_threads);
      },
      NoGil());
  m.def(
      "antialias_backward",
      [](const Silhouettes& args, Address color, Address crossings, Address d_out, Address d_color, Address d_pos,
         int n_threads) {
        MVDREAM_FAST_CPU(antialias_backward)
        (args, at<float>(color), at<int32_t>(crossings), at<float>(d_out), at<float>(d_color), at<float>(d_pos),
         n_threads);
      },
      NoGil());
}

void bind_texture(py::module_& m) {
  py::class_<Textured>(m, "Textured")
      .def(py::init([](Address tex, Address uv, Address uv_da, std::array<int64_t, 4> sizes, std::array<int, 4> shape,
                       int filter, int boundary) {
        const auto [n_images, n_pixels, n_texels, stride] = sizes;
        const auto [height, width, n_levels, n_channels] = shape;
        return Textured{at<float>(tex), at<float>(uv), at<float>(uv_da), n_images,   n_pixels, n_texels, stride,
                        height,         width,         n_levels,         n_channels, filter,   boundary};
      }));
  m.def(
      "texture_forward",
      [](const Textured& args, Address out, int n_threads) {
        MVDREAM_FAST_CPU(texture_forward)(args, at<float>(out), n_threads);
      },
      NoGil());
  m.def(
      "texture_backward",
      [](const Textured& args, Address d_out, Address d_tex, Address d_uv, Address d_da, int n_threads) {
        MVDREAM_FAST_CPU(texture_backward)
        (args, at<float>(d_out), at<float>(d_tex), at<float>(d_uv), at<float>(d_da), n_threads);
      },
      NoGil());
}

void bind_rasterize(py::module_& m) {
  py::class_<Meshes>(m, "Meshes")
      .def(py::init(
          [](Address pos, Address tri, int64_t n_images, int64_t n_vertices, int64_t n_faces, int height, int width) {
            return Meshes{at<float>(pos), at<int32_t>(tri), n_images, n_vertices, n_faces, height, width};
          }));
  m.def(
      "rasterize_forward",
      [](const Meshes& meshes, Address rast, Address rast_db, int n_threads) {
        return MVDREAM_FAST_CPU(rasterize_forward)(meshes, at<float>(rast), at<float>(rast_db), n_threads);
      },
      NoGil());
  m.def(
      "rasterize_backward",
      [](const Meshes& meshes, Address rast, Address d_rast, Address d_db, Address d_pos, int n_threads) {
        MVDREAM_FAST_CPU(rasterize_backward)
        (meshes, at<float>(rast), at<float>(d_rast), at<float>(d_db), at<float>(d_pos), n_threads);
      },
      NoGil());
}

void bind_fragments(py::module_& m) {
  m.def(
      "fragment_counts",
      [](const Meshes& meshes, Address counts, int n_threads) {
        return MVDREAM_FAST_CPU(fragment_counts)(meshes, at<int64_t>(counts), n_threads);
      },
      NoGil());
  m.def(
      "fragment_fill",
      [](const Meshes& meshes, Address starts, std::array<int64_t, 2> faces, std::array<Address, 3> out,
         int n_threads) {
        const auto [first, end] = faces;
        const Fragments fragments{at<int64_t>(starts), first, end, at<int64_t>(out[0]), at<int64_t>(out[1]),
                                  at<float>(out[2])};
        MVDREAM_FAST_CPU(fragment_fill)(meshes, fragments, n_threads);
      },
      NoGil());
}

}  // namespace

void bind_shapes(py::module_& m) {
  bind_rasterize(m);
  bind_fragments(m);
  bind_interpolate(m);
  bind_antialias(m);
  bind_texture(m);
}

}  // namespace mvdream_fast
