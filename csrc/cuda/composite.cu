// composite on GPUs: a warp takes a ray, its lanes 32 samples at a time. Transmittance is a scan of 1 - alpha through
// the lanes; sums are float64 as on the CPU, so that results agree to their last float32 digits.
#include "composite.h"
#include "cuda/launch.cuh"
#include "cuda/ops.h"

namespace mvdream_fast::cuda {
namespace {

using namespace device;

constexpr int kThreads = 128;

// One sample of a ray on this lane; beyond the ray's end alpha is 0.
struct Lane {
  bool here;
  int64_t i;
  float alpha, mid;
  double transmittance;  // in front of the sample
};

__device__ Lane load_lane(const Packed& samples, const float* sigmas, int64_t start, int64_t last, double* before) {
  Lane lane;
  lane.i = start + lane_index();
  lane.here = lane.i < last;
  lane.alpha = lane.mid = 0;
  if (lane.here) {
    const float t0 = samples.t_starts[lane.i], t1 = samples.t_ends[lane.i];
    lane.alpha = alpha_of(sigmas[lane.i] * (t1 - t0));
    lane.mid = 0.5f * (t0 + t1);
  }
  const double through = warp_scan(1.0 - lane.alpha, [](double a, double b) { return a * b; });
  const double front = __shfl_up_sync(kAllLanes, through, 1);
  lane.transmittance = lane_index() == 0 ? *before : *before * front;
  *before *= __shfl_sync(kAllLanes, through, kWarp - 1);
  return lane;
}

__global__ void __launch_bounds__(kThreads, 4) composite_forward_kernel(Packed samples, CompositeForward args) {
  for (int64_t ray = warp_index(); ray < samples.n_rays; ray += n_warps()) {
    const int64_t first = samples.packed_info[2 * ray], last = first + samples.packed_info[2 * ray + 1];
    RaySums sums;  // of this lane's samples
    double before = 1;
    for (int64_t start = first; start < last; start += kWarp) {
      const Lane lane = load_lane(samples, args.sigmas, start, last, &before);
      sums.transmittance = lane.transmittance;
      if (lane.here) args.out_weights[lane.i] = add_sample(&sums, lane.alpha, args.rgb + 3 * lane.i, lane.mid);
    }
    for (int c = 0; c < 3; ++c) sums.rgb[c] = warp_sum(sums.rgb[c]);
    sums.opacity = warp_sum(sums.opacity);
    sums.depth = warp_sum(sums.depth);
    sums.second_moment = warp_sum(sums.second_moment);
    if (lane_index() != 0) continue;
    for (int c = 0; c < 3; ++c) {
      const double behind = args.background ? args.background[ray * args.background_stride + c] : 0.0;
      args.out_rgb[3 * ray + c] = static_cast<float>(sums.rgb[c] + (1.0 - sums.opacity) * behind);
    }
    args.out_opacity[ray] = static_cast<float>(sums.opacity);
    args.out_depth[ray] = static_cast<float>(sums.depth);
    args.out_z_variance[ray] = static_cast<float>(z_variance_of(sums));
  }
}

__device__ RayAdjoint adjoint_of(const CompositeBackward& args, int64_t ray) {
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

// dL/dw times w, and dL/dw, of this lane's sample.
__device__ double weighted_cotangent(const CompositeBackward& args, const RayAdjoint& adjoint, const Lane& lane,
                                     double* g) {
  *g = 0;
  if (!lane.here) return 0;
  *g = weight_cotangent(adjoint, args.rgb + 3 * lane.i, lane.mid, args.d_weights ? args.d_weights[lane.i] : 0.0f);
  return *g * lane.transmittance * lane.alpha;
}

// What lies behind a sample, sum_{j>i} g_j w_j, is the ray's total less a scan: a first pass makes the total.
__global__ void __launch_bounds__(kThreads, 4) composite_backward_kernel(Packed samples, CompositeBackward args) {
  for (int64_t ray = warp_index(); ray < samples.n_rays; ray += n_warps()) {
    const int64_t first = samples.packed_info[2 * ray], last = first + samples.packed_info[2 * ray + 1];
    const RayAdjoint adjoint = adjoint_of(args, ray);
    double before = 1, behind = 0, g;
    for (int64_t start = first; start < last; start += kWarp) {
      const Lane lane = load_lane(samples, args.sigmas, start, last, &before);
      behind += weighted_cotangent(args, adjoint, lane, &g);
    }
    behind = warp_sum(behind);
    before = 1;
    for (int64_t start = first; start < last; start += kWarp) {
      const Lane lane = load_lane(samples, args.sigmas, start, last, &before);
      const double term = weighted_cotangent(args, adjoint, lane, &g);
      const double up_to = warp_scan(term, [](double a, double b) { return a + b; });
      if (lane.here) {
        const double delta = samples.t_ends[lane.i] - samples.t_starts[lane.i];
        const double after = lane.transmittance * (1.0 - lane.alpha);
        args.d_sigmas[lane.i] = static_cast<float>(delta * (g * after - (behind - up_to)));
        const double weight = lane.transmittance * lane.alpha;
        for (int c = 0; c < 3; ++c) {
          args.d_colors[3 * lane.i + c] = static_cast<float>(weight * adjoint.d_rgb[c]);
        }
      }
      behind -= __shfl_sync(kAllLanes, up_to, kWarp - 1);
    }
    if (args.d_background != nullptr && lane_index() < 3) {
      const int c = lane_index();
      const double d = args.d_rgb ? args.d_rgb[3 * ray + c] : 0.0f;
      args.d_background[3 * ray + c] = static_cast<float>((1.0 - adjoint.opacity) * d);
    }
  }
}

}  // namespace

void composite_forward(const Packed& samples, const CompositeForward& args, Queue queue) {
  const DeviceGuard guard(queue.device);
  launch("composite forward", composite_forward_kernel, blocks_for(samples.n_rays, kThreads / kWarp), kThreads, 0,
         queue.stream, samples, args);
}

void composite_backward(const Packed& samples, const CompositeBackward& args, Queue queue) {
  const DeviceGuard guard(queue.device);
  launch("composite backward", composite_backward_kernel, blocks_for(samples.n_rays, kThreads / kWarp), kThreads, 0,
         queue.stream, samples, args);
}

}  // namespace mvdream_fast::cuda
