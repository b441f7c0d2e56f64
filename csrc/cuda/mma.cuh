// The one way to the tensor cores: a warp's 16 x 8 += 16 x 8 times 8 x 8 with float32 sums. The host body does the same
// with the fragments of all lanes, laid out as the PTX manual says, so that tests prove the layouts.
//
// Lane 4 g + t holds of A rows g and g + 8 at k = t and t + 4, of B column g at the same k, of C rows g and g + 8 at
// columns 2 t and 2 t + 1.
#pragma once

#include <cstring>

#include "cuda/launch.cuh"

namespace mvdream_fast::cuda {

// To the nearest number of 10 bits behind the point: one instruction from sm_90 on.
__device__ inline uint32_t to_tf32(float x) {
  uint32_t bits;
#if defined(__CUDACC__) && defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm("cvt.rn.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
#elif defined(__CUDACC__)
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
#else
  std::memcpy(&bits, &x, sizeof bits);
  if ((bits >> 23 & 0xff) != 0xff) bits += 0xfff + (bits >> 13 & 1);
  bits &= ~0x1fffu;
#endif
  return bits;
}

// Tensor cores read the upper 19 bits of a factor, whatever the others are.
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
  const auto read = [](const uint32_t* from, int n, float* to) {
    for (int i = 0; i < n; ++i) {
      const uint32_t bits = from[i] & ~0x1fffu;
      std::memcpy(to + i, &bits, sizeof bits);
    }
  };
  read(a, 4, own.a);
  read(b, 2, own.b);
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

// A float32 fragment for the tensor cores: rounded to tf32 where that is asked for (kTf32), else as a sum of two whose
// three larger products carry about 20 bits. The high part is cut off rather than rounded, one logical operation; what
// is left has 13 bits, of which the tensor cores read 11.
template <int N, bool kTf32>
struct Factor {
  uint32_t high[N], low[N];
};

template <bool kTf32, int N>
__device__ inline Factor<N, kTf32> factor_of(const float (&x)[N]) {
  Factor<N, kTf32> factor;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if (kTf32) {
      factor.high[i] = to_tf32(x[i]);
      continue;
    }
    uint32_t bits;
    float high;
    memcpy(&bits, x + i, sizeof bits);
    bits &= ~0x1fffu;
    memcpy(&high, &bits, sizeof high);
    factor.high[i] = bits;
    const float low = x[i] - high;
    memcpy(&factor.low[i], &low, sizeof low);
  }
  return factor;
}

template <bool kTf32>
__device__ inline void multiply_add(float* c, const Factor<4, kTf32>& a, const float (&b)[2]) {
  const Factor<2, kTf32> other = factor_of<kTf32>(b);
  if (!kTf32) {
    mma_tf32(c, a.low, other.high);
    mma_tf32(c, a.high, other.low);
  }
  mma_tf32(c, a.high, other.high);
}

}  // namespace mvdream_fast::cuda
