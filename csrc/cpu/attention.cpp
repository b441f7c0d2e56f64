// Softmax attention on CPUs that never writes all scores out: blocks of keys pass by a block of queries, whose sum of
// weighted values is scaled anew as larger scores turn up. Keys and values are packed once for all threads; a thread
// owns blocks of queries, and each row is summed in a fixed order: any number of threads gives the same bits.
// Source: Milakov and Gimelshein 2018, "Online normalizer calculation for softmax"; Dao 2023, "FlashAttention-2".
#include "cpu/attention.h"

#include <algorithm>
#include <cmath>
#include <memory>

#include "activations.h"

#ifdef _OPENMP
#include <omp.h>
#else
static int omp_get_thread_num() { return 0; }
#endif

namespace mvdream_fast {
namespace MVDREAM_FAST_ISA {

namespace {

constexpr int64_t kRows = kLanes == 16 ? 8 : 6;  // of a product at a time, and
constexpr int64_t kPanel = 2 * kLanes;           // columns: their sums fill the registers
constexpr int64_t kQueries = kLanes == 16 ? 64 : 60;
constexpr int64_t kKeys = 512;                     // of a block: keys and values fit into the second-level cache
constexpr int64_t kMostWidth = 256;                // D
constexpr int64_t kStride = kKeys + kLanes;        // rows a power of two apart would share few sets of the cache
constexpr int64_t kMostPacked = int64_t(4) << 20;  // numbers of packed keys and values that are alive at a time
constexpr int64_t kAhead = 8;                      // tokens, which may lie too far apart to be fetched unasked
constexpr int64_t kSerial = 65536;                 // multiplications below which threads cost more than they save
constexpr float kInfinity = __builtin_inff();
static_assert(kQueries % kRows == 0 && kKeys % kPanel == 0 && kKeys >= kMostWidth);

constexpr int64_t up_to(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

struct alignas(64) Line {
  float numbers[16];
};

// The tokens of one scene and head.
struct Sequence {
  const Tokens& of;
  int64_t scene, head, n_heads, width;

  int64_t view(int64_t t) const { return scene * of.n_views + t / of.n_tokens; }

  // The numbers of token t, with zeros up to a whole vector.
  void read(int64_t t, float* out) const {
    const float* x = of.data + view(t) * of.image + t % of.n_tokens * of.token + head * of.head;
    const float* later = t % of.n_tokens + kAhead < of.n_tokens ? x + kAhead * of.token : x;
    for (int64_t d = 0; d < width; d += 16) __builtin_prefetch(later + d * of.number);
    const float* camera = of.camera ? of.camera + (view(t) * n_heads + head) * width : nullptr;
    for (int64_t d = 0; d < width; d += kLanes) {
      const int64_t n = std::min<int64_t>(kLanes, width - d);
      VecF numbers = {};
      if (of.number == 1)
        numbers = load_first(x + d, n);
      else
        for (int64_t i = 0; i < n; ++i) numbers[i] = x[(d + i) * of.number];
      store(out + d, camera ? numbers + load_first(camera + d, n) : numbers);
    }
  }
};

// Keys of a scene and head as panels [D, kPanel], and values as panels of columns [tokens, kPanel]; the last panel of
// either is perhaps narrower. So a product reads them in order.
struct Packed {
  int64_t n, width;
  float *keys, *values;

  static int64_t size(int64_t n, int64_t width) { return up_to(n, kLanes) * width + n * up_to(width, kLanes); }
  Packed(float* memory, int64_t n, int64_t width)
      : n(n), width(width), keys(memory), values(memory + up_to(n, kLanes) * width) {}

  // Columns of the panel that starts with column `first` of n_columns.
  static int64_t columns(int64_t first, int64_t n_columns) {
    return std::min(kPanel, up_to(n_columns, kLanes) - first);
  }

  // The tokens of the panel of keys that starts with `first`; there are zeros for those behind the last.
  void pack(const Sequence& k, const Sequence& v, int64_t first) const {
    alignas(64) float rows[4][kMostWidth];
    const int64_t n_columns = columns(first, n), n_tokens = std::min(kPanel, n - first);
    float* panel = keys + first * width;
    for (int64_t t = 0; t < n_columns; t += 4) {
      for (int64_t i = 0; i < 4; ++i) {
        if (t + i < n_tokens)
          k.read(first + t + i, rows[i]);
        else
          std::fill_n(rows[i], up_to(width, kLanes), 0.0f);
      }
      for (int64_t d = 0; d < width; d += kLanes)
        transposed(load(rows[0] + d), load(rows[1] + d), load(rows[2] + d), load(rows[3] + d),
                   [&](int64_t i, const float* four) {
                     if (d + i < width) std::memcpy(panel + (d + i) * n_columns + t, four, 4 * sizeof(float));
                   });
    }
    for (int64_t t = first; t < first + n_tokens; ++t) {
      v.read(t, rows[0]);
      for (int64_t d = 0; d < width; d += kPanel) {
        const int64_t n_numbers = columns(d, width);
        for (int64_t i = 0; i < n_numbers; i += kLanes)
          store(values + d * n + t * n_numbers + i, load(rows[0] + d + i));
      }
    }
  }
};

// out [kRows, kVectors] = a [kRows, n] x b [n, kVectors], with kAdd plus what out was, times keep [kRows]. Rows of a
// and out lie kStride apart. Inlined, it would be left too few registers.
template <int64_t kVectors, bool kAdd>
__attribute__((noinline)) void multiply(const float* a, const float* b, int64_t n, const float* keep, float* out) {
  VecF sum[kRows][kVectors] = {};
  int64_t k = 0;
  do {  // n > 0: GCC then keeps the sums in registers
    VecF of_b[kVectors];
    for (int64_t v = 0; v < kVectors; ++v) of_b[v] = load(b + (k * kVectors + v) * kLanes);
    for (int64_t r = 0; r < kRows; ++r)  // in this order, one register is enough for a
      for (int64_t v = 0; v < kVectors; ++v) sum[r][v] += a[r * kStride + k] * of_b[v];
  } while (++k < n);
  for (int64_t r = 0; r < kRows; ++r)
    for (int64_t v = 0; v < kVectors; ++v) {
      float* at = out + r * kStride + v * kLanes;
      store(at, kAdd ? load(at) * keep[r] + sum[r][v] : sum[r][v]);
    }
}

template <bool kAdd>
void multiply_panel(const float* a, const float* b, int64_t n_columns, int64_t n, const float* keep, float* out) {
  (n_columns == kPanel ? multiply<2, kAdd> : multiply<1, kAdd>)(a, b, n, keep, out);
}

// 2^(x * factor) for x <= 0 <= factor, where bound * factor = -127: 0 from there on, NaN of NaN, 1 of 0. Relative error
// below 2e-7; the polynomial is a minimax fit of degree 5.
MVDREAM_FAST_INLINE VecF exp2_below(VecF x, float factor, float bound) {
  x = larger(splat(bound), x);
  // Adding 1.5 * 2^23 + 127 rounds to an integer k, and leaves k + 127 in the low bits: the exponent of 2^k.
  const VecF shifted = x * factor + 12583039.0f;
  const VecF k = shifted - 12583039.0f;
  const VecF r = x * factor - k;
  VecF p = r * 0.001326472731307149f + 0.009671512991189957f;
  p = p * r + 0.05550733581185341f;
  p = p * r + 0.24022242426872253f;
  p = p * r + 0.6931470036506653f;
  p = p * r + 1.0f;
  return p * (VecF)((VecU)shifted << 23);
}

// What one thread works on for a block of queries: rows of queries and of sums of weighted values, scores of a few
// rows, the largest score of each row so far and its weights' sum, a vector each.
struct Scratch {
  alignas(64) float q[kQueries * kStride], y[kQueries * kStride], scores[kRows * kStride], total[kQueries * kLanes];
  float most[kQueries];
};

// The largest of each row [kRows, n_columns].
void row_maxima(const float* scores, int64_t n_columns, float* most) {
  VecF of_row[up_to(kRows, 4)] = {};
  for (int64_t r = 0; r < kRows; ++r) {
    const float* row = scores + r * kStride;
    of_row[r] = load(row);
    for (int64_t i = kLanes; i < n_columns; i += kLanes) of_row[r] = larger(of_row[r], load(row + i));
  }
  for (int64_t r = 0; r < kRows; r += 4) {
    const VecF four = maxima_of_four(of_row[r], of_row[r + 1], of_row[r + 2], of_row[r + 3]);
    std::memcpy(most + r, &four, std::min<int64_t>(4, kRows - r) * sizeof(float));
  }
}

// Scores [kRows, n] to weights exp(scale * (score - the row's largest)); keep [kRows]: what the sums so far are to be
// multiplied with. factor is scale * log2(e).
void weigh(float* scores, int64_t n, float factor, float* most, float* total, float* keep) {
  const int64_t n_columns = up_to(n, kLanes), n_whole = n / kLanes * kLanes;
  const float bound = -127.0f / factor;
  for (int64_t r = 0; r < kRows; ++r) std::fill(scores + r * kStride + n, scores + r * kStride + n_columns, -kInfinity);
  float largest[kRows];
  row_maxima(scores, n_columns, largest);
  for (int64_t r = 0; r < kRows; ++r) {
    float* row = scores + r * kStride;
    const float next = largest[r] > most[r] ? largest[r] : most[r];
    const float centre = next == -kInfinity ? 0.0f : next;
    VecF sum = {};
    const auto weight = [&](int64_t i) {
      const VecF x = exp2_below(load(row + i) - centre, factor, bound);
      store(row + i, x);
      return x;
    };
    for (int64_t i = 0; i < n_whole; i += kLanes) sum += weight(i);
    if (n_whole < n) {
      weight(n_whole);
      sum += load_first(row + n_whole, n - n_whole);
    }
    if (next == most[r])
      keep[r] = 1.0f;
    else
      keep[r] = most[r] == -kInfinity ? 0.0f : exp2_below(splat(most[r] - centre), factor, bound)[0];
    store(total + r * kLanes, load(total + r * kLanes) * keep[r] + sum);
    most[r] = next;
  }
}

// The sums of a block of `n_rows` queries over all keys, into the scratch memory; queries are there already.
void sum_up(const Packed& packed, int64_t n_rows, float factor, Scratch& work) {
  const int64_t width = packed.width;
  std::fill_n(work.most, n_rows, -kInfinity);
  std::fill_n(work.total, n_rows * kLanes, 0.0f);
  for (int64_t r = 0; r < n_rows; ++r) std::fill_n(work.y + r * kStride, up_to(width, kLanes), 0.0f);
  for (int64_t key = 0; key < packed.n; key += kKeys) {
    const int64_t n_keys = std::min(kKeys, packed.n - key);
    for (int64_t r = 0; r < n_rows; r += kRows) {
      for (int64_t i = 0; i < n_keys; i += kPanel) {
        const int64_t n_columns = Packed::columns(key + i, packed.n);
        multiply_panel<false>(work.q + r * kStride, packed.keys + (key + i) * width, n_columns, width, nullptr,
                              work.scores + i);
      }
      float keep[kRows];
      weigh(work.scores, n_keys, factor, work.most + r, work.total + r * kLanes, keep);
      for (int64_t d = 0; d < width; d += kPanel) {
        const int64_t n_columns = Packed::columns(d, width);
        multiply_panel<true>(work.scores, packed.values + d * packed.n + key * n_columns, n_columns, n_keys, keep,
                             work.y + r * kStride + d);
      }
    }
  }
}

// y of n queries from `first` on, and lse [n] unless that is null.
void attend(const Sequence& q, const Packed& packed, int64_t first, int64_t n, float scale, float* y, float* lse,
            Scratch& work) {
  const int64_t width = q.width, n_rows = up_to(n, kRows);
  for (int64_t r = 0; r < n; ++r) q.read(first + r, work.q + r * kStride);
  for (int64_t r = n; r < n_rows; ++r) std::fill_n(work.q + r * kStride, width, 0.0f);
  sum_up(packed, n_rows, scale * 1.44269504f, work);
  for (int64_t r = 0; r < n; ++r) {
    float total = 0;
    for (int64_t i = 0; i < kLanes; ++i) total += work.total[r * kLanes + i];
    const int64_t t = first + r;
    float* out = y + ((q.view(t) * q.of.n_tokens + t % q.of.n_tokens) * q.n_heads + q.head) * width;
    for (int64_t d = 0; d < width; d += kLanes)
      store_first(out + d, load(work.y + r * kStride + d) * (1.0f / total), std::min<int64_t>(kLanes, width - d));
    if (lse) lse[r] = work.most[r] * scale + std::log(total);
  }
}

}  // namespace

void attention_forward(const Attention& attention, float* y, float* lse, int n_threads) {
  const int64_t n_heads = attention.n_heads, width = attention.width, n_pairs = attention.n_scenes * n_heads;
  const int64_t n_queries = attention.q.per_scene(), n_keys = attention.k.per_scene();
  const int64_t n_panels = (n_keys + kPanel - 1) / kPanel, n_blocks = (n_queries + kQueries - 1) / kQueries;
  const int64_t size = Packed::size(n_keys, width);
  const int64_t at_once = std::max<int64_t>(1, std::min(n_pairs, kMostPacked / size));
  const std::unique_ptr<Line[]> memory(new Line[up_to(at_once * size, 16) / 16]);
  const std::unique_ptr<Scratch[]> scratch(new Scratch[n_threads]);
  const auto packed_of = [&](int64_t i) { return Packed(memory[0].numbers + i * size, n_keys, width); };
  const auto sequence = [&](const Tokens& of, int64_t pair) {
    return Sequence{of, pair / n_heads, pair % n_heads, n_heads, width};
  };
#pragma omp parallel num_threads(n_threads) if (n_pairs * n_queries * n_keys * width > kSerial)
  for (int64_t start = 0; start < n_pairs; start += at_once) {
    const int64_t n = std::min(at_once, n_pairs - start);
#pragma omp for schedule(static)
    for (int64_t task = 0; task < n * n_panels; ++task) {
      const int64_t i = task / n_panels;
      packed_of(i).pack(sequence(attention.k, start + i), sequence(attention.v, start + i), task % n_panels * kPanel);
    }
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < n * n_blocks; ++task) {
      const int64_t i = task / n_blocks, first = task % n_blocks * kQueries;
      attend(sequence(attention.q, start + i), packed_of(i), first, std::min(kQueries, n_queries - first),
             attention.scale, y, lse ? lse + (start + i) * n_queries + first : nullptr, scratch[omp_get_thread_num()]);
    }
  }
}

}  // namespace MVDREAM_FAST_ISA
}  // namespace mvdream_fast
