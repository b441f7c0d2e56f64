// composite on CPUs: the opacities of a chunk of rays in one SIMD loop, then each ray in the order of its samples.
#include "composite.h"

#include <vector>

#include "cpu/thrown.h"
#include "cpu/walks.h"

namespace mvdream_fast {
namespace MVDREAM_FAST_ISA {

// Runs body(first ray, one past the last, first sample, one past the last, alphas) over fixed chunks of rays.
template <typename Body>
static void for_chunks(const Packed& samples, const float* sigmas, Body body) {
  const int64_t n_chunks = (samples.n_rays + kRaysPerChunk - 1) / kRaysPerChunk;
  Thrown thrown;
#pragma omp parallel num_threads(samples.n_threads)
  {
    std::vector<float> alphas;
#pragma omp for schedule(dynamic, 1)
    for (int64_t chunk = 0; chunk < n_chunks; ++chunk) {
      thrown.keep([&] {
        const int64_t ray = chunk * kRaysPerChunk;
        const int64_t end = ray + kRaysPerChunk < samples.n_rays ? ray + kRaysPerChunk : samples.n_rays;
        const int64_t first = samples.packed_info[2 * ray];
        const int64_t last = samples.packed_info[2 * end - 2] + samples.packed_info[2 * end - 1];
        alphas.resize(last - first);
        float* alpha = alphas.data();
        const float *sigma = sigmas + first, *t0 = samples.t_starts + first, *t1 = samples.t_ends + first;
        for (int64_t i = 0; i < last - first; ++i) alpha[i] = alpha_of(sigma[i] * (t1[i] - t0[i]));
        body(ray, end, first, alpha);
      });
    }
  }
  thrown.rethrow();
}

static inline float mid(const Packed& samples, int64_t i) { return 0.5f * (samples.t_starts[i] + samples.t_ends[i]); }

void composite_forward(const Packed& samples, const CompositeForward& args) {
  for_chunks(samples, args.sigmas, [&](int64_t ray, int64_t end, int64_t first, const float* alpha) {
    int64_t i = first;
    for (; ray < end; ++ray) {
      RaySums sums;
      for (const int64_t last = i + samples.packed_info[2 * ray + 1]; i < last; ++i)
        args.out_weights[i] = add_sample(&sums, alpha[i - first], args.rgb + 3 * i, mid(samples, i));
      for (int c = 0; c < 3; ++c) {
        const double behind = args.background ? args.background[ray * args.background_stride + c] : 0.0;
        args.out_rgb[3 * ray + c] = static_cast<float>(sums.rgb[c] + (1.0 - sums.opacity) * behind);
      }
      args.out_opacity[ray] = static_cast<float>(sums.opacity);
      args.out_depth[ray] = static_cast<float>(sums.depth);
      args.out_z_variance[ray] = static_cast<float>(z_variance_of(sums));
    }
  });
}

static RayAdjoint adjoint_of(const CompositeBackward& args, int64_t ray) {
  RayAdjoint adjoint;
  for (int c = 0; c < 3; ++c) {
    adjoint.d_rgb[c] = args.d_rgb ? args.d_rgb[3 * ray + c] : 0.0f;
    adjoint.background[c] = args.background ? args.background[ray * args.background_stride + c] : 0.0f;
  }
  adjoint.d_opacity = args.d_opacity ? args.d_opacity[ray] : 0.0f;
  adjoint.d_depth = args.d_depth ? args.d_depth[ray] : 0.0f;
  adjoint.d_z_variance = args.d_z_variance ? args.d_z_variance[ray] : 0.0f;
  adjoint.opacity = args.opacity[ray];
  adjoint.depth = args.depth[ray];
  return adjoint;
}

void composite_backward(const Packed& samples, const CompositeBackward& args) {
  for_chunks(samples, args.sigmas, [&](int64_t ray, int64_t end, int64_t first, const float* alpha) {
    std::vector<double> transmittance;
    int64_t start = first;
    for (; ray < end; ++ray) {
      const int64_t n = samples.packed_info[2 * ray + 1];
      const RayAdjoint adjoint = adjoint_of(args, ray);
      transmittance.resize(n + 1);
      transmittance[0] = 1;
      for (int64_t j = 0; j < n; ++j) transmittance[j + 1] = transmittance[j] * (1.0 - alpha[start - first + j]);
      double behind = 0;  // sum of g_j w_j over the samples behind this one
      for (int64_t j = n - 1; j >= 0; --j) {
        const int64_t i = start + j;
        const double w = transmittance[j] * alpha[i - first];
        const double g =
            weight_cotangent(adjoint, args.rgb + 3 * i, mid(samples, i), args.d_weights ? args.d_weights[i] : 0.0f);
        const double delta = samples.t_ends[i] - samples.t_starts[i];
        args.d_sigmas[i] = static_cast<float>(delta * (g * transmittance[j + 1] - behind));
        for (int c = 0; c < 3; ++c) args.d_colors[3 * i + c] = static_cast<float>(w * adjoint.d_rgb[c]);
        behind += g * w;
      }
      if (args.d_background)
        for (int c = 0; c < 3; ++c)
          args.d_background[3 * ray + c] = static_cast<float>((1.0 - adjoint.opacity) * adjoint.d_rgb[c]);
      start += n;
    }
  });
}

}  // namespace MVDREAM_FAST_ISA
}  // namespace mvdream_fast
