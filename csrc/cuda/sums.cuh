// Sums of many numbers into few places by atomics: in float64, or under deterministic algorithms in fixed point, which
// no order of the threads changes. That takes the terms twice: once for the largest of them, which sets the point.
#pragma once

#include <cmath>

#include "cuda/launch.cuh"
#include "cuda/ops.h"

namespace mvdream_fast::cuda {

// Where a kernel's terms go.
struct Sink {
  enum Mode { kAdd, kMeasure, kFixed } mode;
  double* sums;
  int* largest;  // bits of a float, which are ordered as what they stand for where that is not negative
  unsigned long long* fixed;
  int64_t n_terms;

  __device__ float largest_term() const {
    float value;
    memcpy(&value, largest, sizeof value);
    return value;
  }
  // So that no sum of all terms leaves 62 bits.
  __device__ double scale() const {
    const double most = double(largest_term()) * double(n_terms);
    return most > 0 ? 4611686018427387904.0 / most : 0;
  }
  __device__ void add(int64_t place, double value) const {
    if (mode == kAdd) {
      atomicAdd(sums + place, value);
    } else if (mode == kMeasure) {
      const float size = static_cast<float>(value < 0 ? -value : value) * 1.0001f;  // not below the term
      int bits;
      memcpy(&bits, &size, sizeof bits);
      if (value != 0) atomicMax(largest, bits & 0x7fffffff);
    } else {
      const double scaled = value * scale();
      if (scaled - scaled == 0) atomicAdd(fixed + place, static_cast<unsigned long long>(llrint(scaled)));
    }
  }
  __device__ float result(int64_t place) const {
    if (mode == kAdd) return static_cast<float>(sums[place]);
    const float most = largest_term();
    if (!(most - most == 0)) return most - most;  // NaN, of a term that is no number
    return most > 0 ? static_cast<float>(static_cast<double>(static_cast<long long>(fixed[place])) / scale()) : 0.0f;
  }
};

static __global__ void sums_kernel(Sink sink, int64_t n, float* out) {
  for (int64_t i = thread_index(); i < n; i += n_threads()) out[i] = sink.result(i);
}

// Calls run(sink), which launches what adds up to n_terms numbers to each of n sums, and writes the sums to `out`.
template <typename Run>
void summed(const char* name, int64_t n, int64_t n_terms, float* out, Queue queue, Run run) {
  const Scratch<double> sums(queue.deterministic ? 0 : n, queue.stream);
  const Scratch<unsigned long long> fixed(queue.deterministic ? n : 0, queue.stream);
  const Scratch<int> largest(1, queue.stream);
  Sink sink{Sink::kAdd, sums.get(), largest.get(), fixed.get(), n_terms};
  if (queue.deterministic) {
    fixed.zero(n);
    largest.zero(1);
    sink.mode = Sink::kMeasure;
    run(sink);
    sink.mode = Sink::kFixed;
  } else {
    sums.zero(n);
  }
  run(sink);
  launch(name, sums_kernel, blocks_for(n, 256), 256, 0, queue.stream, sink, n, out);
}

}  // namespace mvdream_fast::cuda
