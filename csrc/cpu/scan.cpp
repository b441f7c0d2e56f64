// Sums and products along the rays of packed samples, and the general grid traversal, on CPUs.
#include "cpu/scan.h"

namespace mvdream_fast {
namespace MVDREAM_FAST_ISA {

static constexpr int64_t kRaysPerChunk = 64;

template <typename T>
static void scan(const ScanArgs& args) {
  const T* in = static_cast<const T*>(args.values);
  T* out = static_cast<T*>(args.out);
#pragma omp parallel for schedule(dynamic, kRaysPerChunk) num_threads(args.n_threads)
  for (int64_t ray = 0; ray < args.n_rays; ++ray) {
    const int64_t first = args.packed_info[2 * ray], n = args.packed_info[2 * ray + 1];
    double total = args.product ? 1.0 : 0.0;
    for (int64_t j = 0; j < n; ++j) {
      const int64_t i = first + (args.reverse ? n - 1 - j : j);
      const double value = in[i];
      if (args.exclusive) out[i] = static_cast<T>(total);
      total = args.product ? total * value : total + value;
      if (!args.exclusive) out[i] = static_cast<T>(total);
    }
  }
}

// d_i = (product before i) * behind_i, with behind_i = d_out_i + x_{i+1} behind_{i+1}; exclusive products move d_out by
// one. No division, so a factor of zero has its true gradient.
template <typename T>
static void product_backward(const ScanArgs& args, const void* cotangent) {
  const T *in = static_cast<const T*>(args.values), *d_out = static_cast<const T*>(cotangent);
  T* out = static_cast<T*>(args.out);
#pragma omp parallel for schedule(dynamic, kRaysPerChunk) num_threads(args.n_threads)
  for (int64_t ray = 0; ray < args.n_rays; ++ray) {
    const int64_t first = args.packed_info[2 * ray], last = first + args.packed_info[2 * ray + 1] - 1;
    double behind = 0, before = 1;
    for (int64_t i = last; i >= first; --i) {
      const double next = i < last ? static_cast<double>(in[i + 1]) * behind : 0.0;
      const double own = args.exclusive ? (i < last ? static_cast<double>(d_out[i + 1]) : 0.0) : d_out[i];
      behind = own + next;
      out[i] = static_cast<T>(behind);
    }
    for (int64_t i = first; i <= last; ++i) {
      out[i] = static_cast<T>(before * out[i]);
      before *= in[i];
    }
  }
}

void packed_scan(const ScanArgs& args) { args.wide ? scan<double>(args) : scan<float>(args); }

void packed_product_backward(const ScanArgs& args, const void* d_out) {
  args.wide ? product_backward<double>(args, d_out) : product_backward<float>(args, d_out);
}

void traverse(const TraverseArgs& args) {
  const GridStack grids = grids_of(args);
  const bool fine = boxes_fine(grids);
  int worst = fine ? kMarchFine : kMarchBox;
#pragma omp parallel for schedule(dynamic, kRaysPerChunk) num_threads(args.n_threads) reduction(max : worst)
  for (int64_t ray = 0; ray < args.n_rays; ++ray) {
    const int status = traverse_ray(args, grids, fine, ray);
    worst = status > worst ? status : worst;
  }
  *args.status = worst;
}

}  // namespace MVDREAM_FAST_ISA
}  // namespace mvdream_fast
