// One vector of floats, as wide as the instruction set the file is compiled for, on the compiler's vector extensions.
// Also the few functions a field needs on it: exp, sigmoid, softplus. No intrinsics, so one source serves every set.
#pragma once

#include <cstring>

#include "hd.h"

namespace mvdream_fast::MVDREAM_FAST_ISA {

#ifdef MVDREAM_FAST_LANES  // given by hand: 16 lanes can be tried on any processor
#elif defined(__AVX512F__)
#define MVDREAM_FAST_LANES 16
#elif defined(__AVX__)
#define MVDREAM_FAST_LANES 8
#else
#define MVDREAM_FAST_LANES 4
#endif
constexpr int kLanes = MVDREAM_FAST_LANES;

#define MVDREAM_FAST_INLINE static inline __attribute__((always_inline))

typedef float VecF __attribute__((vector_size(kLanes * 4)));
typedef int32_t VecI __attribute__((vector_size(kLanes * 4)));
typedef uint32_t VecU __attribute__((vector_size(kLanes * 4)));
typedef double VecD __attribute__((vector_size(kLanes * 4)));     // half as many doubles: pairs of floats
typedef double VecWide __attribute__((vector_size(kLanes * 8)));  // as many doubles as floats

MVDREAM_FAST_INLINE VecF load(const float* p) {
  VecF v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
MVDREAM_FAST_INLINE void store(float* p, VecF v) { std::memcpy(p, &v, sizeof v); }
MVDREAM_FAST_INLINE VecF splat(float x) { return x - VecF{}; }
MVDREAM_FAST_INLINE VecU splat_u(uint32_t x) { return x - VecU{}; }
MVDREAM_FAST_INLINE VecF to_float(VecI v) { return __builtin_convertvector(v, VecF); }
MVDREAM_FAST_INLINE VecI truncate(VecF v) { return __builtin_convertvector(v, VecI); }
MVDREAM_FAST_INLINE VecF min(VecF a, VecF b) { return a < b ? a : b; }
// Of a NaN `a` these keep `b`: max(x, 0) maps NaN to 0.
MVDREAM_FAST_INLINE VecF max(VecF a, VecF b) { return a > b ? a : b; }
// Keeps NaN, so that broken weights show in the output.
MVDREAM_FAST_INLINE VecF relu(VecF a) { return 0.0f > a ? VecF{} : a; }
MVDREAM_FAST_INLINE VecF abs(VecF a) { return (VecF)((VecU)a & 0x7fffffffu); }

MVDREAM_FAST_INLINE VecF sqrt(VecF a) {
  for (int i = 0; i < kLanes; ++i) a[i] = __builtin_sqrtf(a[i]);
  return a;
}

// Shuffles that stay within 128 bits, where they cost one instruction. With samples 0..7 in `a`:
//   zip_low(a, b)  a0 b0 a1 b1 | a4 b4 a5 b5     even(zip_low(a, b), zip_high(a, b)) = a
//   zip_high(a, b) a2 b2 a3 b3 | a6 b6 a7 b7      odd(zip_low(a, b), zip_high(a, b)) = b
//   join_low(a, b) a0 a1 b0 b1 | a4 a5 b4 b5      join_high(a, b) a2 a3 b2 b3 | a6 a7 b6 b7
#if defined(__clang__) || __GNUC__ >= 12
#define MVDREAM_FAST_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define MVDREAM_FAST_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, VecI{__VA_ARGS__})
#endif
#if MVDREAM_FAST_LANES == 4
#define MVDREAM_FAST_EACH_128(a, b, i, j, k, l) MVDREAM_FAST_SHUFFLE(a, b, i, j, k, l)
#elif MVDREAM_FAST_LANES == 8
#define MVDREAM_FAST_EACH_128(a, b, i, j, k, l) \
  MVDREAM_FAST_SHUFFLE(a, b, i, j, k, l, (i) + 4, (j) + 4, (k) + 4, (l) + 4)
#else
#define MVDREAM_FAST_EACH_128(a, b, i, j, k, l)                                                                  \
  MVDREAM_FAST_SHUFFLE(a, b, i, j, k, l, (i) + 4, (j) + 4, (k) + 4, (l) + 4, (i) + 8, (j) + 8, (k) + 8, (l) + 8, \
                       (i) + 12, (j) + 12, (k) + 12, (l) + 12)
#endif
MVDREAM_FAST_INLINE VecF zip_low(VecF a, VecF b) { return MVDREAM_FAST_EACH_128(a, b, 0, kLanes, 1, kLanes + 1); }
MVDREAM_FAST_INLINE VecF zip_high(VecF a, VecF b) { return MVDREAM_FAST_EACH_128(a, b, 2, kLanes + 2, 3, kLanes + 3); }
MVDREAM_FAST_INLINE VecF even(VecF a, VecF b) { return MVDREAM_FAST_EACH_128(a, b, 0, 2, kLanes, kLanes + 2); }
MVDREAM_FAST_INLINE VecF odd(VecF a, VecF b) { return MVDREAM_FAST_EACH_128(a, b, 1, 3, kLanes + 1, kLanes + 3); }
MVDREAM_FAST_INLINE VecF join_low(VecF a, VecF b) { return MVDREAM_FAST_EACH_128(a, b, 0, 1, kLanes, kLanes + 1); }
MVDREAM_FAST_INLINE VecF join_high(VecF a, VecF b) { return MVDREAM_FAST_EACH_128(a, b, 2, 3, kLanes + 2, kLanes + 3); }
// The sample behind the pair `slot` of zip_low (slot < kLanes / 2) and zip_high.
constexpr int zipped_sample(int slot) {
  const int half = slot % (kLanes / 2);
  return 4 * (half / 2) + half % 2 + (slot >= kLanes / 2 ? 2 : 0);
}

// Calls put(index, four) with the numbers at `index` of a, b, c and d, for every index of a vector.
template <typename Put>
MVDREAM_FAST_INLINE void transposed(VecF a, VecF b, VecF c, VecF d, Put put) {
  const VecF ab = zip_low(a, b), cd = zip_low(c, d), ab_high = zip_high(a, b), cd_high = zip_high(c, d);
  const VecF of[4] = {join_low(ab, cd), join_high(ab, cd), join_low(ab_high, cd_high), join_high(ab_high, cd_high)};
  for (int64_t i = 0; i < 4; ++i)
    for (int64_t part = 0; part < kLanes; part += 4) put(part + i, reinterpret_cast<const float*>(&of[i]) + part);
}

// a * b + c with one rounding. Sets without FMA take a detour through double, which is exact up to double rounding.
MVDREAM_FAST_INLINE VecF fused_multiply_add(VecF a, float b, float c) {
#if defined(__FMA__) || defined(__aarch64__)
  return a * b + c;
#else
  return __builtin_convertvector(__builtin_convertvector(a, VecWide) * double(b) + double(c), VecF);
#endif
}

// Cody-Waite reduction to |r| <= ln(2) / 2 and the Taylor polynomial of degree 7 there: relative error below 2e-7.
// Above the largest float's logarithm the result is inf, below the smallest normal's it is 0; NaN stays NaN.
MVDREAM_FAST_INLINE VecF exp(VecF x) {
  const VecF clamped = min(max(x, splat(-87.3365f)), splat(88.7228f));
  const VecF k = to_float(truncate(clamped * 1.44269504f + (VecF)((VecU)splat(0.5f) | ((VecU)x & 0x80000000u))));
  VecF r = clamped - k * 0.693145752f;
  r = r - k * 1.42860677e-6f;
  VecF p = r * 1.98412698e-4f + 1.38888889e-3f;
  p = p * r + 8.33333333e-3f;
  p = p * r + 4.16666667e-2f;
  p = p * r + 1.66666667e-1f;
  p = p * r + 0.5f;
  p = p * r * r + r + 1.0f;
  // 2^k in two factors, since 2^128 alone is no float although its product with p < 1 may be.
  const VecI half = truncate(k) >> 1;
  const VecF low = (VecF)((half + 127) << 23), high = (VecF)((truncate(k) - half + 127) << 23);
  const VecF y = p * low * high;
  const VecF inner = x < -87.3365f ? splat(0.0f) : y;
  return x > 88.7228f ? splat(__builtin_inff()) : x != x ? x : inner;
}

MVDREAM_FAST_INLINE VecF sigmoid(VecF x) {
  const VecF e = exp(-abs(x));
  return (x < 0.0f ? e : splat(1.0f)) / (1.0f + e);
}

// max(x, 0) + log1p(exp(-|x|)); log1p(u) = 2 atanh(u / (2 + u)), a series in s^2 <= 1/9: relative error below 3e-7.
MVDREAM_FAST_INLINE VecF softplus(VecF x) {
  const VecF u = exp(-abs(x));
  const VecF s = u / (2.0f + u), q = s * s;
  VecF p = q * (1.0f / 15) + 1.0f / 13;
  p = p * q + 1.0f / 11;
  p = p * q + 1.0f / 9;
  p = p * q + 1.0f / 7;
  p = p * q + 0.2f;
  p = p * q + 1.0f / 3;
  p = p * q + 1.0f;
  return relu(x) + 2.0f * s * p;
}

// The sums over the lanes of four vectors, in the lanes 0..3 of the result.
MVDREAM_FAST_INLINE VecF sums_of_four(VecF a, VecF b, VecF c, VecF d) {
  const VecF ab = zip_low(a, b) + zip_high(a, b), cd = zip_low(c, d) + zip_high(c, d);  // a0+a2 b0+b2 a1+a3 b1+b3
  VecF sum = join_low(ab, cd) + join_high(ab, cd);
  for (int from = 4; from < kLanes; from += 4) {
    for (int i = 0; i < 4; ++i) sum[i] += sum[from + i];
  }
  return sum;
}

}  // namespace mvdream_fast::MVDREAM_FAST_ISA
