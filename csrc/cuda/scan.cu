// packed_scan on GPUs: a warp takes a ray, its lanes 32 samples at a time, and carries float64 totals from one 32 to
// the next, as on the CPU: results agree to their last digit. Where rays lie is not checked, which would have to wait
// for the answer: what reaches beyond the samples is cut off.
#include "cpu/scan.h"
#include "cuda/launch.cuh"
#include "cuda/ops.h"

namespace mvdream_fast::cuda {
namespace {

constexpr int kThreads = 128;

template <bool kWide>
using Number = std::conditional_t<kWide, double, float>;

// One ray's samples: from `first` on, n of them, all inside the S there are.
struct Span {
  int64_t first, n;
};

__device__ Span span_of(const ScanArgs& args, int64_t ray) {
  int64_t first = args.packed_info[2 * ray];
  const int64_t n = args.packed_info[2 * ray + 1];
  first = first < 0 ? 0 : first < args.n_samples ? first : args.n_samples;
  return {first, n < args.n_samples - first ? n : args.n_samples - first};
}

template <bool kWide, bool kProduct>
__global__ void __launch_bounds__(kThreads, 8) packed_scan_kernel(const __grid_constant__ ScanArgs args) {
  using T = Number<kWide>;
  const T* in = static_cast<const T*>(args.values);
  T* out = static_cast<T*>(args.out);
  const auto join = [](double a, double b) { return kProduct ? a * b : a + b; };
  const double neutral = kProduct ? 1.0 : 0.0;
  for (int64_t ray = warp_index(); ray < args.n_rays; ray += n_warps()) {
    const Span span = span_of(args, ray);
    double before = neutral;
    for (int64_t start = 0; start < span.n; start += kWarp) {
      const int64_t j = start + lane_index(), i = span.first + (args.reverse ? span.n - 1 - j : j);
      const double up_to = join(before, warp_scan(j < span.n ? double(in[i]) : neutral, join));
      const double up_to_last = __shfl_up_sync(kAllLanes, up_to, 1);
      if (j < span.n) out[i] = static_cast<T>(!args.exclusive ? up_to : lane_index() == 0 ? before : up_to_last);
      before = __shfl_sync(kAllLanes, up_to, kWarp - 1);
    }
  }
}

// Of maps x -> add + times x, one a lane: this lane's after those of all lanes behind it, the last one's first.
__device__ inline void join_from_the_end(double* add, double* times) {
#pragma unroll
  for (int offset = 1; offset < kWarp; offset *= 2) {
    const double add_behind = __shfl_down_sync(kAllLanes, *add, offset);
    const double times_behind = __shfl_down_sync(kAllLanes, *times, offset);
    if (lane_index() + offset >= kWarp) continue;
    *add += *times * add_behind;
    *times *= times_behind;
  }
}

// d_i = (product before i) * behind_i, with behind_i = d_out_i + x_{i+1} behind_{i+1}; exclusive products move d_out by
// one. No division, so a factor of zero has its true gradient. The first pass goes from the end and leaves behind_i in
// the result.
template <bool kWide>
__global__ void __launch_bounds__(kThreads, 8)
    product_backward_kernel(const __grid_constant__ ScanArgs args, const Number<kWide>* d_out) {
  using T = Number<kWide>;
  const T* in = static_cast<const T*>(args.values);
  T* out = static_cast<T*>(args.out);
  for (int64_t ray = warp_index(); ray < args.n_rays; ray += n_warps()) {
    const Span span = span_of(args, ray);
    double behind = 0;
    for (int64_t start = (span.n - 1) / kWarp * kWarp; start >= 0 && span.n > 0; start -= kWarp) {
      const int64_t j = start + lane_index(), i = span.first + j;
      const bool here = j < span.n, has_next = j + 1 < span.n;
      double add = 0, times = 1;
      if (here) add = !args.exclusive ? d_out[i] : has_next ? d_out[i + 1] : T(0);
      if (here) times = has_next ? in[i + 1] : T(0);
      join_from_the_end(&add, &times);
      const double value = add + times * behind;
      if (here) out[i] = static_cast<T>(value);
      behind = __shfl_sync(kAllLanes, value, 0);
    }
    double before = 1;
    for (int64_t start = 0; start < span.n; start += kWarp) {
      const int64_t j = start + lane_index(), i = span.first + j;
      const double up_to =
          before * warp_scan(j < span.n ? double(in[i]) : 1.0, [](double a, double b) { return a * b; });
      const double up_to_last = __shfl_up_sync(kAllLanes, up_to, 1);
      if (j < span.n) out[i] = static_cast<T>((lane_index() == 0 ? before : up_to_last) * out[i]);
      before = __shfl_sync(kAllLanes, up_to, kWarp - 1);
    }
  }
}

int64_t blocks_of(const ScanArgs& args) { return blocks_for(args.n_rays, kThreads / kWarp); }

// Calls body(whether the values are float64) with that as a compile-time constant.
template <typename Body>
void with_width(const ScanArgs& args, Body body) {
  if (args.wide) return body(std::true_type());
  return body(std::false_type());
}

}  // namespace

void packed_scan(const ScanArgs& args, Queue queue) {
  const DeviceGuard guard(queue.device);
  with_width(args, [&](auto wide) {
    const auto kernel = args.product ? packed_scan_kernel<wide, true> : packed_scan_kernel<wide, false>;
    launch("packed scan", kernel, blocks_of(args), kThreads, 0, queue.stream, args);
  });
}

void packed_product_backward(const ScanArgs& args, const void* d_out, Queue queue) {
  const DeviceGuard guard(queue.device);
  with_width(args, [&](auto wide) {
    launch("packed product backward", product_backward_kernel<wide>, blocks_of(args), kThreads, 0, queue.stream, args,
           static_cast<const Number<wide>*>(d_out));
  });
}

}  // namespace mvdream_fast::cuda
