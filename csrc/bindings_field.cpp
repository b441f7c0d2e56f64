// The hash-grid encoding and the radiance field. Addresses come as integers, 0 for none.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <tuple>
#include <vector>

#include "cpu/field.h"
#include "cpu/hash_encode.h"

namespace py = pybind11;

namespace mvdream_fast {
namespace {

using Address = std::uintptr_t;
using Layers = std::vector<std::tuple<Address, int, int>>;  // address, outputs, inputs
using Level = std::tuple<float, uint32_t, int64_t, uint32_t, bool>;

float* floats(Address address) { return reinterpret_cast<float*>(address); }

HashGrid make_grid(int n_features, const std::vector<Level>& levels) {
  if (levels.empty() || levels.size() > kMaxLevels) throw std::invalid_argument("HashGrid: 1 to 32 levels");
  HashGrid grid;
  grid.n_levels = int(levels.size());
  grid.n_features = n_features;
  for (int i = 0; i < grid.n_levels; ++i) {
    const auto [scale, resolution, offset, size, hashed] = levels[i];
    grid.levels[i] = {scale, resolution, size, offset, hashed};
  }
  return grid;
}

Mlp make_mlp(const Layers& layers) {
  if (layers.size() > kMaxLayers) throw std::invalid_argument("Mlp: at most 4 layers");
  Mlp mlp;
  for (const auto& [weights, n_out, n_in] : layers) {
    mlp.weights[mlp.n_layers] = floats(weights);
    mlp.sizes[mlp.n_layers++] = n_in;
    mlp.sizes[mlp.n_layers] = n_out;
  }
  return mlp;
}

Field make_field(const HashGrid& grid, float to_unit, float bias_scale, float bias_std, int activation,
                 bool color_sigmoid, Address table, const Layers& density, const Layers& color) {
  Field field;
  field.grid = grid;
  field.table = floats(table);
  field.density = make_mlp(density);
  field.color = make_mlp(color);
  field.to_unit = to_unit;
  field.bias_scale = bias_scale;
  field.bias_std = bias_std;
  if (activation < 0 || activation > 2) throw std::invalid_argument("Field: the activation is 0, 1 or 2");
  field.activation = DensityActivation(activation);
  field.color_sigmoid = color_sigmoid;
  return field;
}

}  // namespace

void bind_field(py::module_& m) {
  using NoGil = py::call_guard<py::gil_scoped_release>;
  py::class_<HashGrid>(m, "HashGrid").def(py::init(&make_grid));
  py::class_<Field>(m, "Field").def(py::init(&make_field));
  m.def(
      "hash_encode_forward",
      [](const HashGrid& grid, Address table, Address positions, int64_t n, Address out, int n_threads) {
        return MVDREAM_FAST_CPU(hash_encode_forward)(grid, floats(table), floats(positions), n, floats(out), n_threads);
      },
      NoGil());
  m.def(
      "hash_encode_backward",
      [](const HashGrid& grid, Address table, Address positions, int64_t n, Address d_out, Address d_table,
         Address d_positions, int n_threads) {
        return MVDREAM_FAST_CPU(hash_encode_backward)(grid, floats(table), floats(positions), n, floats(d_out),
                                                      floats(d_table), floats(d_positions), n_threads);
      },
      NoGil());
  m.def(
      "field_forward",
      [](const Field& field, Address positions, int64_t n, Address sigmas, Address rgb, int n_threads) {
        return MVDREAM_FAST_CPU(field_forward)(field, floats(positions), n, floats(sigmas), floats(rgb), n_threads);
      },
      NoGil());
  m.def(
      "field_backward",
      [](const Field& field, Address positions, int64_t n, Address d_sigmas, Address d_rgb, Address d_table,
         Address d_density, Address d_color, Address d_positions, int n_threads) {
        const FieldGradients gradients{floats(d_table), floats(d_density), floats(d_color), floats(d_positions)};
        return MVDREAM_FAST_CPU(field_backward)(field, floats(positions), n, floats(d_sigmas), floats(d_rgb), gradients,
                                                n_threads);
      },
      NoGil());
}

}  // namespace mvdream_fast
