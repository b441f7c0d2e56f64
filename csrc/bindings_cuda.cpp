// The CUDA ops under the names and signatures of the CPU's, where a stream's handle takes the place of a number of
// threads: what calls one calls the other. Addresses are device memory and come as integers, 0 for none.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <limits>

#include "cuda/ops.h"

namespace py = pybind11;

namespace mvdream_fast {
namespace {

using Address = std::uintptr_t;
using NoGil = py::call_guard<py::gil_scoped_release>;

template <typename T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

// Arguments of several calls with the queue that they go to.
template <typename T>
struct Queued {
  T args;
  cuda::Queue queue;
};
using QueuedMarch = Queued<MarchArgs>;
using QueuedPacked = Queued<Packed>;
using QueuedScan = Queued<ScanArgs>;

QueuedMarch march_args(Address rays_o, Address rays_d, Address jitter, Address near, Address far, float near_all,
                       float far_all, int64_t n_rays, Address bits, std::array<int, 3> resolution,
                       std::array<float, 6> aabb, float step, int64_t max_samples, cuda::Queue queue) {
  MarchArgs args = {at<float>(rays_o),
                    at<float>(rays_d),
                    at<float>(jitter),
                    at<float>(near),
                    at<float>(far),
                    near_all,
                    far_all,
                    n_rays,
                    at<uint8_t>(bits),
                    {resolution[0], resolution[1], resolution[2]},
                    {aabb[0], aabb[1], aabb[2], aabb[3], aabb[4], aabb[5]},
                    step,
                    max_samples < 0 ? std::numeric_limits<int64_t>::max() : max_samples,
                    1};
  return {args, queue};
}

void bind_queue(py::module_& m) {
  py::class_<cuda::Queue>(m, "Queue")
      .def(py::init([](Address stream, bool deterministic, bool tf32, int device) {
             return cuda::Queue{at<CUstream_st>(stream), deterministic, tf32, device};
           }),
           py::arg("stream"), py::arg("deterministic") = false, py::arg("tf32") = false, py::arg("device") = -1);
  py::implicitly_convertible<py::int_, cuda::Queue>();
}

void bind_march(py::module_& m) {
  py::class_<QueuedMarch>(m, "MarchArgs").def(py::init(&march_args));
  m.def("march_status", [](const QueuedMarch& march) { return cuda::march_status(march.args, march.queue); }, NoGil());
  m.def(
      "march_count",
      [](const QueuedMarch& march, Address counts, Address status) {
        cuda::march_count(march.args, at<int64_t>(counts), at<int64_t>(status), march.queue);
      },
      NoGil());
  m.def(
      "march_fill",
      [](const QueuedMarch& march, Address packed_info, Address t_starts, Address t_ends) {
        cuda::march_fill(march.args, at<int64_t>(packed_info), at<float>(t_starts), at<float>(t_ends), march.queue);
      },
      NoGil());
}

void bind_prune(py::module_& m) {
  m.def(
      "sample_positions",
      [](const QueuedPacked& samples, Address rays_o, Address rays_d, Address positions) {
        cuda::sample_positions(samples.args, at<float>(rays_o), at<float>(rays_d), at<float>(positions), samples.queue);
      },
      NoGil());
  m.def(
      "prune_count",
      [](const QueuedPacked& samples, Address sigmas, double least, double most, Address keep, Address counts) {
        cuda::prune_count(samples.args, at<float>(sigmas), least, most, at<uint8_t>(keep), at<int64_t>(counts),
                          samples.queue);
      },
      NoGil());
  m.def(
      "prune_fill",
      [](const QueuedPacked& samples, Address keep, Address packed_info, Address t_starts, Address t_ends) {
        cuda::prune_fill(samples.args, at<uint8_t>(keep), at<int64_t>(packed_info), at<float>(t_starts),
                         at<float>(t_ends), samples.queue);
      },
      NoGil());
}

void bind_occupancy(py::module_& m) {
  m.def(
      "update_occupancy",
      [](Address ema, int64_t n_cells, Address values, Address cells, int64_t n_values, float decay, float threshold,
         Address new_ema, Address bits, cuda::Queue queue) {
        cuda::update_occupancy(at<float>(ema), n_cells, at<float>(values), at<int64_t>(cells), n_values, decay,
                               threshold, at<float>(new_ema), at<uint8_t>(bits), queue);
      },
      NoGil(), py::arg("ema"), py::arg("n_cells"), py::arg("values"), py::arg("cells"), py::arg("n_values"),
      py::arg("decay"), py::arg("threshold"), py::arg("new_ema"), py::arg("bits"), py::arg("queue") = cuda::Queue());
}

void bind_composite(py::module_& m) {
  py::class_<QueuedPacked>(m, "Packed")
      .def(py::init([](Address t_starts, Address t_ends, Address packed_info, int64_t n_rays, cuda::Queue queue) {
        return QueuedPacked{{at<float>(t_starts), at<float>(t_ends), at<int64_t>(packed_info), n_rays, 1}, queue};
      }));
  m.def(
      "composite_forward",
      [](const QueuedPacked& samples, Address sigmas, Address rgb, Address background, int64_t background_stride,
         Address out_rgb, Address out_opacity, Address out_depth, Address out_weights, Address out_z_variance) {
        cuda::composite_forward(
            samples.args,
            {at<float>(sigmas), at<float>(rgb), at<float>(background), background_stride, at<float>(out_rgb),
             at<float>(out_opacity), at<float>(out_depth), at<float>(out_weights), at<float>(out_z_variance)},
            samples.queue);
      },
      NoGil());
  m.def(
      "composite_backward",
      [](const QueuedPacked& samples, Address sigmas, Address rgb, Address background, int64_t background_stride,
         Address opacity, Address depth, std::array<Address, 5> cotangents, Address d_sigmas, Address d_colors,
         Address d_background) {
        cuda::composite_backward(
            samples.args,
            {at<float>(sigmas), at<float>(rgb), at<float>(background), background_stride, at<float>(opacity),
             at<float>(depth), at<float>(cotangents[0]), at<float>(cotangents[1]), at<float>(cotangents[2]),
             at<float>(cotangents[3]), at<float>(cotangents[4]), at<float>(d_sigmas), at<float>(d_colors),
             at<float>(d_background)},
            samples.queue);
      },
      NoGil());
}

void bind_scan(py::module_& m) {
  py::class_<QueuedScan>(m, "ScanArgs")
      .def(py::init([](Address values, Address packed_info, int64_t n_rays, int64_t n_samples, bool wide, bool product,
                       bool exclusive, bool reverse, Address out, cuda::Queue queue) {
        const ScanArgs args{at<void>(values),
                            at<int64_t>(packed_info),
                            n_rays,
                            n_samples,
                            wide,
                            product,
                            exclusive,
                            reverse,
                            at<void>(out),
                            1};
        return QueuedScan{args, queue};
      }));
  m.def("packed_scan", [](const QueuedScan& scan) { cuda::packed_scan(scan.args, scan.queue); }, NoGil());
  m.def(
      "packed_product_backward",
      [](const QueuedScan& scan, Address d_out) {
        cuda::packed_product_backward(scan.args, at<void>(d_out), scan.queue);
      },
      NoGil());
}

void bind_traverse(py::module_& m) {
  m.def(
      "traverse",
      [](std::array<Address, 7> inputs, int64_t n_rays, int n_grids, std::array<int, 3> n, float step, float cone,
         int64_t limit, std::array<Address, 4> counts, std::array<Address, 6> fill, cuda::Queue queue) {
        cuda::traverse({at<float>(inputs[0]),
                        at<float>(inputs[1]),
                        at<uint8_t>(inputs[2]),
                        at<float>(inputs[3]),
                        at<float>(inputs[4]),
                        at<uint8_t>(inputs[5]),
                        at<float>(inputs[6]),
                        n_rays,
                        n_grids,
                        {n[0], n[1], n[2]},
                        step,
                        cone,
                        limit,
                        at<int64_t>(counts[0]),
                        at<int64_t>(counts[1]),
                        at<float>(counts[2]),
                        at<int>(counts[3]),
                        at<int64_t>(fill[0]),
                        at<int64_t>(fill[1]),
                        at<float>(fill[2]),
                        at<uint8_t>(fill[3]),
                        at<uint8_t>(fill[4]),
                        at<float>(fill[5]),
                        1},
                       queue);
      },
      NoGil());
}

void bind_hash_encode(py::module_& m) {
  m.def(
      "hash_encode_forward",
      [](const HashGrid& grid, Address table, Address positions, int64_t n, Address out, cuda::Queue queue) {
        return cuda::hash_encode_forward(grid, at<float>(table), at<float>(positions), n, at<float>(out), queue);
      },
      NoGil());
  m.def(
      "hash_encode_backward",
      [](const HashGrid& grid, Address table, Address positions, int64_t n, Address d_out, Address d_table,
         Address d_positions, cuda::Queue queue) {
        return cuda::hash_encode_backward(grid, at<float>(table), at<float>(positions), n, at<float>(d_out),
                                          at<float>(d_table), at<float>(d_positions), queue);
      },
      NoGil());
}

void bind_field(py::module_& m) {
  m.def(
      "field_forward",
      [](const Field& field, Address positions, int64_t n, Address sigmas, Address rgb, cuda::Queue queue) {
        return cuda::field_forward(field, at<float>(positions), n, at<float>(sigmas), at<float>(rgb), queue);
      },
      NoGil());
  m.def(
      "field_backward",
      [](const Field& field, Address positions, int64_t n, Address d_sigmas, Address d_rgb, Address d_table,
         Address d_density, Address d_color, Address d_positions, cuda::Queue queue) {
        const FieldGradients gradients{at<float>(d_table), at<float>(d_density), at<float>(d_color),
                                       at<float>(d_positions)};
        return cuda::field_backward(field, at<float>(positions), n, at<float>(d_sigmas), at<float>(d_rgb), gradients,
                                    queue);
      },
      NoGil());
}

void bind_render(py::module_& m) {
  m.def(
      "render",
      [](const Field& field, const QueuedMarch& march, double least, double most, Address background,
         int64_t background_stride, Address rgb, Address opacity, Address depth) {
        return cuda::render(field, march.args, least, most, at<float>(background), background_stride, at<float>(rgb),
                            at<float>(opacity), at<float>(depth), march.queue);
      },
      NoGil());
}

// Their arguments are classes of the CPU's module.
void bind_shapes_cuda(py::module_& m) {
  m.def(
      "rasterize_forward",
      [](const Meshes& meshes, Address rast, Address rast_db, cuda::Queue queue) {
        return cuda::rasterize_forward(meshes, at<float>(rast), at<float>(rast_db), queue);
      },
      NoGil());
  m.def(
      "rasterize_backward",
      [](const Meshes& meshes, Address rast, Address d_rast, Address d_db, Address d_pos, cuda::Queue queue) {
        cuda::rasterize_backward(meshes, at<float>(rast), at<float>(d_rast), at<float>(d_db), at<float>(d_pos), queue);
      },
      NoGil());
  m.def(
      "interpolate_forward",
      [](const Attributes& args, Address out, Address out_da, cuda::Queue queue) {
        return cuda::interpolate_forward(args, at<float>(out), at<float>(out_da), queue);
      },
      NoGil());
  m.def(
      "interpolate_backward",
      [](const Attributes& args, Address d_out, Address d_out_da, Address d_attr, Address d_rast, Address d_db,
         cuda::Queue queue) {
        cuda::interpolate_backward(args, at<float>(d_out), at<float>(d_out_da), at<float>(d_attr), at<float>(d_rast),
                                   at<float>(d_db), queue);
      },
      NoGil());
  m.def(
      "antialias_forward",
      [](const Silhouettes& args, Address color, Address crossings, Address out, cuda::Queue queue) {
        return cuda::antialias_forward(args, at<float>(color), at<int32_t>(crossings), at<float>(out), queue);
      },
      NoGil());
  m.def(
      "antialias_backward",
      [](const Silhouettes& args, Address color, Address crossings, Address d_out, Address d_color, Address d_pos,
         cuda::Queue queue) {
        cuda::antialias_backward(args, at<float>(color), at<int32_t>(crossings), at<float>(d_out), at<float>(d_color),
                                 at<float>(d_pos), queue);
      },
      NoGil());
  m.def(
      "texture_forward",
      [](const Textured& args, Address out, cuda::Queue queue) { cuda::texture_forward(args, at<float>(out), queue); },
      NoGil());
  m.def(
      "texture_backward",
      [](const Textured& args, Address d_out, Address d_tex, Address d_uv, Address d_da, cuda::Queue queue) {
        cuda::texture_backward(args, at<float>(d_out), at<float>(d_tex), at<float>(d_uv), at<float>(d_da), queue);
      },
      NoGil());
}

}  // namespace

void bind_cuda(py::module_& m) {
  bind_queue(m);
  bind_composite(m);
  bind_march(m);
  bind_prune(m);
  bind_occupancy(m);
  bind_scan(m);
  bind_traverse(m);
  bind_hash_encode(m);
  bind_field(m);
  bind_render(m);
  bind_shapes_cuda(m);
}

}  // namespace mvdream_fast

#ifdef MVDREAM_FAST_CUDA_HOST
#include <cuda_runtime.h>

#include "cuda/levels.h"

PYBIND11_MODULE(_cuda_host, m) {
  mvdream_fast::bind_cuda(m);
  m.def("devices", [] { return std::array<int, 2>{shim::device, shim::launched_on}; });  // now, and of the last launch
  m.def("syncs", [] { return shim::syncs; });                                            // waits for a stream so far
  m.def("set_slabs", [](int64_t from, int64_t samples) {
    mvdream_fast::cuda::level_major_from = from;
    mvdream_fast::cuda::slab_samples = samples;
  });
}
#endif
