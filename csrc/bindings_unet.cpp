// The UNet's own ops. Addresses come as integers, 0 for none.
#include <pybind11/pybind11.h>

#include "cpu/attention.h"
#include "cpu/geglu.h"
#include "cpu/group_norm_silu.h"
#include "cpu/winograd.h"

namespace py = pybind11;

namespace mvdream_fast {
namespace {

using Address = std::uintptr_t;

float* floats(Address address) { return reinterpret_cast<float*>(address); }

GroupNorm make_norm(Address x, Address weight, Address bias, Address emb, int64_t emb_stride, int64_t n_images,
                    int64_t n_pixels, int64_t n_channels, int64_t n_groups, bool silu) {
  return {floats(x), floats(weight), floats(bias), floats(emb), emb_stride,
          n_images,  n_pixels,       n_channels,   n_groups,    silu};
}

Tokens make_tokens(Address data, int64_t image, int64_t token, int64_t head, int64_t number, int64_t n_views,
                   int64_t n_tokens, Address camera) {
  return {floats(data), image, token, head, number, n_views, n_tokens, floats(camera)};
}

}  // namespace

void bind_unet(py::module_& m) {
  using NoGil = py::call_guard<py::gil_scoped_release>;
  py::class_<GroupNorm>(m, "GroupNorm").def(py::init(&make_norm));
  m.def(
      "group_norm_silu_forward",
      [](const GroupNorm& norm, float eps, Address y, Address mean, Address rstd, int n_threads) {
        MVDREAM_FAST_CPU(group_norm_silu_forward)(norm, eps, floats(y), floats(mean), floats(rstd), n_threads);
      },
      NoGil());
  m.def(
      "group_norm_silu_backward",
      [](const GroupNorm& norm, Address d_y, Address mean, Address rstd, Address d_x, Address d_weight, Address d_bias,
         Address d_emb, int n_threads) {
        MVDREAM_FAST_CPU(group_norm_silu_backward)(norm, floats(d_y), floats(mean), floats(rstd), floats(d_x),
                                                   floats(d_weight), floats(d_bias), floats(d_emb), n_threads);
      },
      NoGil());
  m.def(
      "geglu_forward",
      [](Address x, int64_t n_rows, int64_t n_columns, Address y, int n_threads) {
        MVDREAM_FAST_CPU(geglu_forward)(floats(x), n_rows, n_columns, floats(y), n_threads);
      },
      NoGil());
  m.def(
      "geglu_backward",
      [](Address d_y, Address x, int64_t n_rows, int64_t n_columns, Address d_x, int n_threads) {
        MVDREAM_FAST_CPU(geglu_backward)(floats(d_y), floats(x), n_rows, n_columns, floats(d_x), n_threads);
      },
      NoGil());
  py::class_<Tokens>(m, "Tokens").def(py::init(&make_tokens));
  m.def(
      "attention_forward",
      [](const Tokens& q, const Tokens& k, const Tokens& v, int64_t n_scenes, int64_t n_heads, int64_t width,
         float scale, Address y, Address lse, int n_threads) {
        const Attention attention{q, k, v, n_scenes, n_heads, width, scale};
        MVDREAM_FAST_CPU(attention_forward)(attention, floats(y), floats(lse), n_threads);
      },
      NoGil());
  py::class_<Images>(m, "Images").def(py::init([](int64_t n_images, int64_t height, int64_t width, int64_t n_channels) {
    return Images{n_images, height, width, n_channels};
  }));
  m.def(
      "winograd_conv3x3",
      [](Address x, const Images& images, Address weight, Address bias, int64_t n_out, Address y, int n_threads) {
        MVDREAM_FAST_CPU(winograd_conv3x3)(floats(x), images, floats(weight), floats(bias), n_out, floats(y),
                                           n_threads);
      },
      NoGil());
  m.def(
      "winograd_conv3x3_weights",
      [](Address x, const Images& images, Address d_y, int64_t n_out, Address d_weight, int n_threads) {
        MVDREAM_FAST_CPU(winograd_conv3x3_weights)(floats(x), images, floats(d_y), n_out, floats(d_weight), n_threads);
      },
      NoGil());
  m.def(
      "turn_weights",
      [](Address weight, int64_t n_out, int64_t n_channels, Address out, int n_threads) {
        MVDREAM_FAST_CPU(turn_weights)(floats(weight), n_out, n_channels, floats(out), n_threads);
      },
      NoGil());
}

}  // namespace mvdream_fast
