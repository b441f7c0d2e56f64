// The one way to the tensor cores: a warp's 16 x 8 += 16 x 8 times 8 x 8 with float32 sums. The host body does the same
// with the fragments of all lanes, laid out as the PTX manual says, so that tests prove the layouts.
//
// Lane 4 g + t holds of A rows g and g + 8 at k = t and t + 4, of B column g at the same k, of C rows g and g + 8 at
// columns 2 t and 2 t + 1.
#pragma once

#include <cstring>

#include "cuda/launch.cuh"

namespace mvdream_fast::cuda {

// To the nearest number of 10 bits behind the point.
__device__ inline uint32_t to_tf32(float x) {
  uint32_t bits;
#ifdef __CUDACC__
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
#else
  std::memcpy(&bits, &x, sizeof bits);
  if ((bits >> 23 & 0xff) != 0xff) bits += 0x1000;
  bits &= ~0x1fffu;
#endif
  return bits;
}

__device__ inline void mma_tf32(float* c, const uint32_t* a, const uint32_t* b) {
#ifdef __CUDACC__
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  struct Fragments {
    float a[4], b[2];
  } own;
  std::memcpy(own.a, a, sizeof own.a);
  std::memcpy(own.b, b, sizeof own.b);
  const int g = lane_index() / 4, t = lane_index() % 4;
  shim::exchange(kAllLanes, own, [&](auto of) {
    for (int e = 0; e < 4; ++e) {
      const int row = g + 8 * (e / 2), column = 2 * t + e % 2;
      for (int k = 0; k < 8; ++k) {
        const float x = of(row % 8 * 4 + k % 4).a[row / 8 + 2 * (k / 4)];
        c[e] += x * of(column * 4 + k % 4).b[k / 4];
      }
    }
    return 0;
  });
#endif
}

// A float32 fragment as the sum of two of tf32: their three larger products carry 21 bits.
template <int N>
struct Split {
  uint32_t high[N], low[N];
};

template <int N>
__device__ inline Split<N> split(const float* x) {
  Split<N> result;
  for (int i = 0; i < N; ++i) {
    float high;
    result.high[i] = to_tf32(x[i]);
    memcpy(&high, &result.high[i], sizeof high);
    result.low[i] = to_tf32(x[i] - high);
  }
  return result;
}

// kTf32 takes the larger product alone.
template <bool kTf32>
__device__ inline void multiply_add(float* c, const Split<4>& a, const float* b) {
  const Split<2> both = split<2>(b);
  if (!kTf32) {
    mma_tf32(c, a.low, both.high);
    mma_tf32(c, a.high, both.low);
  }
  mma_tf32(c, a.high, both.high);
}

}  // namespace mvdream_fast::cuda
