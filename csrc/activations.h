// SiLU and the exact GELU on vectors of floats, with their derivatives: what the UNet's native ops share.
#pragma once

#if defined(__SSE__)
#include <immintrin.h>
#endif

#include "simd.h"

namespace mvdream_fast::MVDREAM_FAST_ISA {

// min and max of simd.h in one instruction, which GCC does not make of a comparison: the same down to NaN and -0.
// Of 512 bits the form with a mask, here of all lanes: in GCC 12's header the plain one reads what it never set.
#if MVDREAM_FAST_LANES == 16
MVDREAM_FAST_INLINE VecF at_most(VecF a, float b) {
  return (VecF)_mm512_maskz_min_ps(0xffff, (__m512)a, (__m512)splat(b));
}
MVDREAM_FAST_INLINE VecF at_least(VecF a, float b) {
  return (VecF)_mm512_maskz_max_ps(0xffff, (__m512)a, (__m512)splat(b));
}
MVDREAM_FAST_INLINE VecF larger(VecF a, VecF b) { return (VecF)_mm512_maskz_max_ps(0xffff, (__m512)a, (__m512)b); }
#elif MVDREAM_FAST_LANES == 8
MVDREAM_FAST_INLINE VecF at_most(VecF a, float b) { return (VecF)_mm256_min_ps((__m256)a, (__m256)splat(b)); }
MVDREAM_FAST_INLINE VecF at_least(VecF a, float b) { return (VecF)_mm256_max_ps((__m256)a, (__m256)splat(b)); }
MVDREAM_FAST_INLINE VecF larger(VecF a, VecF b) { return (VecF)_mm256_max_ps((__m256)a, (__m256)b); }
#else
MVDREAM_FAST_INLINE VecF at_most(VecF a, float b) { return min(a, splat(b)); }
MVDREAM_FAST_INLINE VecF at_least(VecF a, float b) { return max(a, splat(b)); }
MVDREAM_FAST_INLINE VecF larger(VecF a, VecF b) { return max(a, b); }
#endif

// The largest of each of four vectors, in the lanes 0..3 of the result.
MVDREAM_FAST_INLINE VecF maxima_of_four(VecF a, VecF b, VecF c, VecF d) {
  const VecF ab = larger(zip_low(a, b), zip_high(a, b)), cd = larger(zip_low(c, d), zip_high(c, d));
  VecF most = larger(join_low(ab, cd), join_high(ab, cd));
  for (int from = 4; from < kLanes; from += 4) {
    for (int i = 0; i < 4; ++i) most[i] = most[i] > most[from + i] ? most[i] : most[from + i];
  }
  return most;
}

// exp of -87 <= x <= 88, where results are normal floats: a caller clamps, which turns NaN into a bound, and multiplies
// by something that still carries it. Cody-Waite reduction, Cephes' expf polynomial; relative error below 2e-7.
MVDREAM_FAST_INLINE VecF exp_in_range(VecF x) {
  // Adding 1.5 * 2^23 rounds to an integer k, which then is in the low bits.
  const VecF shifted = x * 1.44269504f + 12582912.0f;
  const VecF k = shifted - 12582912.0f;
  const VecF r = x - k * 0.693359375f + k * 2.12194440e-4f;
  VecF p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + (r + 1.0f);
  return (VecF)((VecU)p + ((VecU)shifted << 23));  // times 2^k
}

// 1 + exp(-x): what x is divided by for silu, and 1 for the sigmoid.
MVDREAM_FAST_INLINE VecF sigmoid_divisor(VecF x) { return 1.0f + exp_in_range(at_most(at_least(-x, -87.0f), 88.0f)); }

MVDREAM_FAST_INLINE VecF silu(VecF x) { return x / sigmoid_divisor(x); }

// The derivative of silu: s (1 + x (1 - s)) with s the sigmoid.
MVDREAM_FAST_INLINE VecF silu_slope(VecF x) {
  const VecF s = 1.0f / sigmoid_divisor(x);
  return s * (1.0f + x * (1.0f - s));
}

// The normal distribution at x, up to x and its density: absolute error of `below` about 1e-7, half of erf's.
struct Normal {
  VecF below, density;
};

// The tail beyond |x| is exp(-x^2 / 2) t Q(t) with t = 1 / (1 + 0.3 |x|), the form of Abramowitz and Stegun 7.1.26; Q
// is a minimax fit for |x| <= 14, good to 2.5e-9 of the tail itself.
MVDREAM_FAST_INLINE Normal normal(VecF x) {
  const VecF e = exp_in_range(at_least(x * x * -0.5f, -87.0f));
  const VecF t = 1.0f / (1.0f + 0.3f * abs(x));
  VecF q = t * 0.02949991449713707f - 0.1255216896533966f;
  q = q * t + 0.1382080316543579f;
  q = q * t + 0.025834759697318077f;
  q = q * t + 0.0743122547864914f;
  q = q * t + 0.121493861079216f;
  q = q * t + 0.11613532155752182f;
  q = q * t + 0.12003754079341888f;
  const VecF tail = e * (q * t);
  return {x > 0.0f ? 1.0f - tail : tail, e * 0.3989422804014327f};
}

// The first n <= kLanes numbers at p; where n is a constant, the branch is gone.
MVDREAM_FAST_INLINE VecF load_first(const float* p, int64_t n) {
  if (n == kLanes) return load(p);
  VecF v = {};
  std::memcpy(&v, p, n * sizeof(float));
  return v;
}
MVDREAM_FAST_INLINE void store_first(float* p, VecF v, int64_t n) {
  if (n == kLanes)
    store(p, v);
  else
    std::memcpy(p, &v, n * sizeof(float));
}

}  // namespace mvdream_fast::MVDREAM_FAST_ISA
