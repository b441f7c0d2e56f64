// The packed-sample ops: marching, pruning, compositing, occupancy. Addresses come as integers, 0 for none.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <limits>
#include <memory>

#include "cpu/rays.h"
#include "cpu/scan.h"

namespace py = pybind11;

namespace mvdream_fast {

using Address = std::uintptr_t;

template <typename T>
static T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

// The arguments of a march with the scan of its grid, which all its calls share, and those of a part of its rays.
struct March {
  MarchArgs args;
  std::shared_ptr<const GridScan> scan;

  March rays(int64_t first, int64_t n) const {
    March part = *this;
    part.args.rays_o += 3 * first;
    part.args.rays_d += 3 * first;
    for (const float** of_each : {&part.args.jitter, &part.args.near, &part.args.far})
      if (*of_each != nullptr) *of_each += first;
    part.args.n_rays = n;
    return part;
  }
};

static March march_args(Address rays_o, Address rays_d, Address jitter, Address near, Address far, float near_all,
                        float far_all, int64_t n_rays, Address bits, std::array<int, 3> resolution,
                        std::array<float, 6> aabb, float step, int64_t max_samples, int n_threads) {
  MarchArgs args;
  args.rays_o = at<float>(rays_o);
  args.rays_d = at<float>(rays_d);
  args.jitter = at<float>(jitter);
  args.near = at<float>(near);
  args.far = at<float>(far);
  args.near_all = near_all;
  args.far_all = far_all;
  args.n_rays = n_rays;
  args.bits = at<uint8_t>(bits);
  for (int a = 0; a < 3; ++a) args.resolution[a] = resolution[a];
  for (int a = 0; a < 6; ++a) args.aabb[a] = aabb[a];
  args.step = step;
  args.max_samples = max_samples < 0 ? std::numeric_limits<int64_t>::max() : max_samples;
  args.n_threads = n_threads;
  const auto scan = std::make_shared<GridScan>();
  MVDREAM_FAST_CPU(scan_grid)(args, scan.get());
  args.scan = scan.get();
  return {args, scan};
}

static Packed packed(Address t_starts, Address t_ends, Address packed_info, int64_t n_rays, int n_threads) {
  return {at<float>(t_starts), at<float>(t_ends), at<int64_t>(packed_info), n_rays, n_threads};
}

static void bind_march(py::module_& m) {
  using NoGil = py::call_guard<py::gil_scoped_release>;
  py::class_<March>(m, "MarchArgs").def(py::init(&march_args)).def("rays", &March::rays);
  py::class_<Packed>(m, "Packed").def(py::init(&packed));
  m.def("march_status", [](const March& march) { return MVDREAM_FAST_CPU(march_status)(march.args); }, NoGil());
  m.def(
      "march_count",
      [](const March& march, Address counts, Address status) {
        *at<int64_t>(status) = MVDREAM_FAST_CPU(march_count)(march.args, at<int64_t>(counts));
      },
      NoGil());
  m.def(
      "march_fill",
      [](const March& march, Address packed_info, Address t_starts, Address t_ends) {
        MVDREAM_FAST_CPU(march_fill)
        (march.args, at<int64_t>(packed_info), at<float>(t_starts), at<float>(t_ends));
      },
      NoGil());
  m.def(
      "sample_positions",
      [](const Packed& samples, Address rays_o, Address rays_d, Address positions) {
        MVDREAM_FAST_CPU(sample_positions)(samples, at<float>(rays_o), at<float>(rays_d), at<float>(positions));
      },
      NoGil());
  m.def(
      "prune_count",
      [](const Packed& samples, Address sigmas, double least, double most, Address keep, Address counts) {
        MVDREAM_FAST_CPU(prune_count)
        (samples, at<float>(sigmas), least, most, at<uint8_t>(keep), at<int64_t>(counts));
      },
      NoGil());
  m.def(
      "prune_fill",
      [](const Packed& samples, Address keep, Address packed_info, Address t_starts, Address t_ends) {
        MVDREAM_FAST_CPU(prune_fill)
        (samples, at<uint8_t>(keep), at<int64_t>(packed_info), at<float>(t_starts), at<float>(t_ends));
      },
      NoGil());
}

static void bind_composite(py::module_& m) {
  using NoGil = py::call_guard<py::gil_scoped_release>;
  m.def(
      "composite_forward",
      [](const Packed& samples, Address sigmas, Address rgb, Address background, int64_t background_stride,
         Address out_rgb, Address out_opacity, Address out_depth, Address out_weights, Address out_z_variance) {
        MVDREAM_FAST_CPU(composite_forward)
        (samples, {at<float>(sigmas), at<float>(rgb), at<float>(background), background_stride, at<float>(out_rgb),
                   at<float>(out_opacity), at<float>(out_depth), at<float>(out_weights), at<float>(out_z_variance)});
      },
      NoGil());
  m.def(
      "composite_backward",
      [](const Packed& samples, Address sigmas, Address rgb, Address background, int64_t background_stride,
         Address opacity, Address depth, std::array<Address, 5> cotangents, Address d_sigmas, Address d_colors,
         Address d_background) {
        MVDREAM_FAST_CPU(composite_backward)
        (samples, {at<float>(sigmas), at<float>(rgb), at<float>(background), background_stride, at<float>(opacity),
                   at<float>(depth), at<float>(cotangents[0]), at<float>(cotangents[1]), at<float>(cotangents[2]),
                   at<float>(cotangents[3]), at<float>(cotangents[4]), at<float>(d_sigmas), at<float>(d_colors),
                   at<float>(d_background)});
      },
      NoGil());
}

static void bind_rounds(py::module_& m) {
  using NoGil = py::call_guard<py::gil_scoped_release>;
  m.attr("RENDER_STATE") = kRenderState;
  py::class_<RenderRound>(m, "RenderRound")
      .def(py::init([](Address live, int64_t n_live, int64_t per_round, Address cursor, Address offsets, Address slots,
                       Address state) {
        return RenderRound{at<int64_t>(live),    n_live,           per_round,        at<int64_t>(cursor),
                           at<int64_t>(offsets), at<float>(slots), at<double>(state)};
      }));
  m.def(
      "render_march",
      [](const March& march, const RenderRound& round) { return MVDREAM_FAST_CPU(render_march)(march.args, round); },
      NoGil());
  m.def(
      "render_positions",
      [](const March& march, const RenderRound& round, Address positions) {
        MVDREAM_FAST_CPU(render_positions)(march.args, round, at<float>(positions));
      },
      NoGil());
  m.def(
      "render_composite",
      [](const RenderRound& round, Address sigmas, Address rgb, double least, double most, int n_threads) {
        MVDREAM_FAST_CPU(render_composite)(round, at<float>(sigmas), at<float>(rgb), least, most, n_threads);
      },
      NoGil());
  m.def(
      "render_finish",
      [](Address state, int64_t n_rays, Address background, int64_t background_stride, Address rgb, Address opacity,
         Address depth) {
        MVDREAM_FAST_CPU(render_finish)
        (at<double>(state), n_rays, at<float>(background), background_stride, at<float>(rgb), at<float>(opacity),
         at<float>(depth));
      },
      NoGil());
}

static void bind_scan(py::module_& m) {
  using NoGil = py::call_guard<py::gil_scoped_release>;
  py::class_<ScanArgs>(m, "ScanArgs")
      .def(py::init([](Address values, Address packed_info, int64_t n_rays, int64_t n_samples, bool wide, bool product,
                       bool exclusive, bool reverse, Address out, int n_threads) {
        return ScanArgs{at<void>(values),
                        at<int64_t>(packed_info),
                        n_rays,
                        n_samples,
                        wide,
                        product,
                        exclusive,
                        reverse,
                        at<void>(out),
                        n_threads};
      }));
  m.def("packed_scan", [](const ScanArgs& args) { MVDREAM_FAST_CPU(packed_scan)(args); }, NoGil());
  m.def(
      "packed_product_backward",
      [](const ScanArgs& args, Address d_out) { MVDREAM_FAST_CPU(packed_product_backward)(args, at<void>(d_out)); },
      NoGil());
  m.def(
      "traverse",
      [](std::array<Address, 7> inputs, int64_t n_rays, int n_grids, std::array<int, 3> n, float step, float cone,
         int64_t limit, std::array<Address, 4> counts, std::array<Address, 6> fill, int n_threads) {
        const TraverseArgs args{at<float>(inputs[0]),
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
                                n_threads};
        MVDREAM_FAST_CPU(traverse)(args);
      },
      NoGil());
}

void bind_render(py::module_& m) {
  bind_march(m);
  bind_composite(m);
  bind_rounds(m);
  bind_scan(m);
  m.def(
      "update_occupancy",
      [](Address ema, int64_t n_cells, Address values, Address cells, int64_t n_values, float decay, float threshold,
         Address new_ema, Address bits) {
        MVDREAM_FAST_CPU(update_occupancy)
        (at<float>(ema), n_cells, at<float>(values), at<int64_t>(cells), n_values, decay, threshold, at<float>(new_ema),
         at<uint8_t>(bits));
      },
      py::call_guard<py::gil_scoped_release>());
}

}  // namespace mvdream_fast
