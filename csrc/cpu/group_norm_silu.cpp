// The embedding add, GroupNorm and SiLU on CPUs, on channels-last images cut into blocks of pixels. Sums are float
// within a block and double over blocks, always in the same order: any number of threads gives the same bits.
#include "cpu/group_norm_silu.h"

#include <algorithm>
#include <cmath>
#include <memory>

#include "activations.h"

namespace mvdream_fast {
namespace MVDREAM_FAST_ISA {

namespace {

constexpr int64_t kBlock = 32;          // pixels; few enough that a second look at a block finds it in the cache
constexpr int64_t kSerial = 16384;      // numbers below which a second thread costs more than it saves
constexpr int64_t kOne = 1, kFour = 4;  // vectors at a time

// A piece of an image: the offset of its first number, its pixels, and where its sums lie in scratch memory.
struct Block {
  int64_t start, n_pixels, index;
};

int64_t blocks_of(const GroupNorm& norm) { return (norm.n_pixels + kBlock - 1) / kBlock; }

Block block_at(const GroupNorm& norm, int64_t image, int64_t block) {
  const int64_t first = block * kBlock, left = norm.n_pixels - first;
  return {(image * norm.n_pixels + first) * norm.n_channels, left < kBlock ? left : kBlock,
          image * blocks_of(norm) + block};
}

std::unique_ptr<float[]> floats(int64_t n) { return std::unique_ptr<float[]>(new float[n]); }
std::unique_ptr<double[]> doubles(int64_t n) { return std::unique_ptr<double[]>(new double[n]); }

// Runs first(block) on all blocks of an image, then middle(image), then last(image, block) on all blocks. Where the
// images share out evenly, each stays on one thread and in its cache; the order within an image is always the same.
template <typename First, typename Middle, typename Last>
void in_three_steps(const GroupNorm& norm, int n_threads, First first, Middle middle, Last last) {
  const int64_t n_blocks = blocks_of(norm), n_images = norm.n_images;
  const bool whole_images = n_images % n_threads == 0 || n_images >= 8 * n_threads;
#pragma omp parallel num_threads(n_threads) if (n_images * norm.n_pixels * norm.n_channels > kSerial)
  if (whole_images) {
#pragma omp for schedule(static)
    for (int64_t image = 0; image < n_images; ++image) {
      for (int64_t i = 0; i < n_blocks; ++i) first(image, block_at(norm, image, i));
      middle(image);
      for (int64_t i = 0; i < n_blocks; ++i) last(image, block_at(norm, image, i));
    }
  } else {
#pragma omp for schedule(static)
    for (int64_t i = 0; i < n_images * n_blocks; ++i) first(i / n_blocks, block_at(norm, i / n_blocks, i % n_blocks));
#pragma omp for schedule(static)
    for (int64_t image = 0; image < n_images; ++image) middle(image);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < n_images * n_blocks; ++i) last(i / n_blocks, block_at(norm, i / n_blocks, i % n_blocks));
  }
}

// Means [C] of a block's channels, and behind them the sums [C] of squared distances from these.
template <int64_t kVectors>
MVDREAM_FAST_INLINE void moments(const float* x, int64_t n_pixels, int64_t n_channels, float* out, int64_t n) {
  VecF mean[kVectors] = {}, squares[kVectors] = {};
  for (int64_t pixel = 0; pixel < n_pixels; ++pixel)
    for (int64_t v = 0; v < kVectors; ++v) mean[v] += load_first(x + pixel * n_channels + v * kLanes, n);
  for (int64_t v = 0; v < kVectors; ++v) mean[v] *= 1.0f / float(n_pixels);
  for (int64_t pixel = 0; pixel < n_pixels; ++pixel)
    for (int64_t v = 0; v < kVectors; ++v) {
      const VecF centred = load_first(x + pixel * n_channels + v * kLanes, n) - mean[v];
      squares[v] += centred * centred;
    }
  for (int64_t v = 0; v < kVectors; ++v) {
    store_first(out + v * kLanes, mean[v], n);
    store_first(out + n_channels + v * kLanes, squares[v], n);
  }
}

void block_moments(const GroupNorm& norm, const Block& block, float* out) {
  const int64_t n_channels = norm.n_channels;
  const float* x = norm.x + block.start;
  int64_t c = 0;
  for (; c + kFour * kLanes <= n_channels; c += kFour * kLanes)
    moments<kFour>(x + c, block.n_pixels, n_channels, out + c, kLanes);
  for (; c + kLanes <= n_channels; c += kLanes) moments<kOne>(x + c, block.n_pixels, n_channels, out + c, kLanes);
  if (c < n_channels) moments<kOne>(x + c, block.n_pixels, n_channels, out + c, n_channels - c);
}

double sum(const double* values, int64_t n) {
  double total = 0;
  for (int64_t i = 0; i < n; ++i) total += values[i];
  return total;
}

// Mean and variance of a group from the moments of blocks (Chan et al. 1979), per channel first. work: [2 * C].
struct Statistics {
  const GroupNorm& norm;
  const float* moments;  // of the image's first block
  const float* emb;      // of the image, or null
  double* work;

  // work[c] = the channel's mean, with emb.
  void channel_means() {
    const int64_t n_channels = norm.n_channels, n_blocks = blocks_of(norm);
    for (int64_t c = 0; c < n_channels; ++c) work[c] = 0;
    for (int64_t i = 0; i < n_blocks; ++i) {
      const double share = double(block_at(norm, 0, i).n_pixels) / norm.n_pixels;
      const float* means = moments + 2 * i * n_channels;
      for (int64_t c = 0; c < n_channels; ++c) work[c] += share * means[c];
    }
    if (emb)
      for (int64_t c = 0; c < n_channels; ++c) work[c] += emb[c];
  }

  // work[C + c] = the mean squared distance of the channel's pixels from its own mean work[c].
  void channel_variances() {
    const int64_t n_channels = norm.n_channels, n_blocks = blocks_of(norm);
    double* variances = work + n_channels;
    for (int64_t c = 0; c < n_channels; ++c) variances[c] = 0;
    for (int64_t i = 0; i < n_blocks; ++i) {
      const double share = double(block_at(norm, 0, i).n_pixels) / norm.n_pixels, scale = 1.0 / norm.n_pixels;
      const float *means = moments + 2 * i * n_channels, *squares = means + n_channels;
      for (int64_t c = 0; c < n_channels; ++c) {
        const double offset = means[c] + (emb ? double(emb[c]) : 0.0) - work[c];
        variances[c] += scale * squares[c] + share * offset * offset;
      }
    }
  }
};

// What turns x into the affine map's result: (x - shift) * scale + bias. [C] each, of one image.
struct Affine {
  float *shift, *scale;
};

void image_affine(const GroupNorm& norm, const float* moments, int64_t image, float eps, double* work, Affine out,
                  float* mean, float* rstd) {
  const int64_t n_channels = norm.n_channels, width = n_channels / norm.n_groups;
  const float* emb = norm.emb ? norm.emb + image * norm.emb_stride : nullptr;
  Statistics statistics{norm, moments, emb, work};
  statistics.channel_means();
  statistics.channel_variances();
  for (int64_t group = 0; group < norm.n_groups; ++group) {
    const int64_t first = group * width;
    const double centre = sum(work + first, width) / width;
    double variance = sum(work + n_channels + first, width);
    for (int64_t c = first; c < first + width; ++c) variance += (work[c] - centre) * (work[c] - centre);
    const double inverse = 1.0 / std::sqrt(variance / width + eps);
    for (int64_t c = first; c < first + width; ++c) {
      out.shift[c] = float(centre - (emb ? emb[c] : 0.0f));
      out.scale[c] = float(inverse * norm.weight[c]);
    }
    if (mean) mean[image * norm.n_groups + group] = float(centre);
    if (rstd) rstd[image * norm.n_groups + group] = float(inverse);
  }
}

template <bool kSilu>
MVDREAM_FAST_INLINE void apply(const float* x, Affine affine, const float* bias, float* y, int64_t n) {
  const VecF z = (load_first(x, n) - load_first(affine.shift, n)) * load_first(affine.scale, n) + load_first(bias, n);
  store_first(y, kSilu ? silu(z) : z, n);
}

template <bool kSilu>
void apply_block(const GroupNorm& norm, const Block& block, Affine affine, float* y) {
  const int64_t n_channels = norm.n_channels;
  for (int64_t pixel = 0; pixel < block.n_pixels; ++pixel) {
    const int64_t at = block.start + pixel * n_channels;
    int64_t c = 0;
    for (; c + kLanes <= n_channels; c += kLanes)
      apply<kSilu>(norm.x + at + c, {affine.shift + c, affine.scale + c}, norm.bias + c, y + at + c, kLanes);
    if (c < n_channels)
      apply<kSilu>(norm.x + at + c, {affine.shift + c, affine.scale + c}, norm.bias + c, y + at + c, n_channels - c);
  }
}

// Of one image in the backward pass, [C] each: xhat = (x - shift) * rstd, and d_x = d_z * gain - drift - (x - shift) *
// slope, which are known only once the sums are.
struct Adjoint {
  float *shift, *rstd, *gain, *drift, *slope;

  Adjoint(float* memory, int64_t n_channels)
      : shift(memory),
        rstd(shift + n_channels),
        gain(rstd + n_channels),
        drift(gain + n_channels),
        slope(drift + n_channels) {}
};

// n channels of a pixel: d_z into d_x, and d_z, d_z * xhat and xhat added to the sums [3, C].
template <bool kSilu>
MVDREAM_FAST_INLINE void adjoint(const GroupNorm& norm, const float* x, const float* d_y, Adjoint of, float* d_x,
                                 float* sums, int64_t c, int64_t n) {
  const VecF xhat = (load_first(x + c, n) - load_first(of.shift + c, n)) * load_first(of.rstd + c, n);
  VecF d_z = load_first(d_y + c, n);
  if (kSilu) d_z *= silu_slope(xhat * load_first(norm.weight + c, n) + load_first(norm.bias + c, n));
  store_first(d_x + c, d_z, n);
  float *sum = sums + c, *sum_xhat = sum + norm.n_channels, *total_xhat = sum_xhat + norm.n_channels;
  store_first(sum, load_first(sum, n) + d_z, n);
  store_first(sum_xhat, load_first(sum_xhat, n) + d_z * xhat, n);
  store_first(total_xhat, load_first(total_xhat, n) + xhat, n);
}

// Pixel by pixel, as they lie in memory: the sums stay in the first-level cache, where adding to them costs nothing
// beside silu_slope.
template <bool kSilu>
void adjoint_block(const GroupNorm& norm, const Block& block, const float* d_y, Adjoint of, float* d_x, float* sums) {
  const int64_t n_channels = norm.n_channels;
  std::fill_n(sums, 3 * n_channels, 0.0f);
  for (int64_t pixel = 0; pixel < block.n_pixels; ++pixel) {
    const int64_t at = block.start + pixel * n_channels;
    int64_t c = 0;
    for (; c + kLanes <= n_channels; c += kLanes)
      adjoint<kSilu>(norm, norm.x + at, d_y + at, of, d_x + at, sums, c, kLanes);
    if (c < n_channels) adjoint<kSilu>(norm, norm.x + at, d_y + at, of, d_x + at, sums, c, n_channels - c);
  }
}

void image_shifts(const GroupNorm& norm, int64_t image, const float* mean, const float* rstd, Adjoint out) {
  const int64_t width = norm.n_channels / norm.n_groups;
  for (int64_t c = 0; c < norm.n_channels; ++c) {
    const int64_t group = image * norm.n_groups + c / width;
    out.shift[c] = mean[group] - (norm.emb ? norm.emb[image * norm.emb_stride + c] : 0.0f);
    out.rstd[c] = rstd[group];
  }
}

// Adds up the blocks' sums into work [3, C], and derives gain, drift, slope and d_emb from them.
void image_adjoint(const GroupNorm& norm, const float* sums, double* work, Adjoint out, float* d_emb) {
  const int64_t n_channels = norm.n_channels, width = n_channels / norm.n_groups;
  for (int64_t i = 0; i < 3 * n_channels; ++i) work[i] = 0;
  for (int64_t block = 0; block < blocks_of(norm); ++block)
    for (int64_t i = 0; i < 3 * n_channels; ++i) work[i] += sums[3 * block * n_channels + i];
  const double n = double(width) * norm.n_pixels;
  for (int64_t first = 0; first < n_channels; first += width) {
    double sum = 0, sum_xhat = 0;
    for (int64_t c = first; c < first + width; ++c) {
      sum += norm.weight[c] * work[c];
      sum_xhat += norm.weight[c] * work[n_channels + c];
    }
    const double rstd = out.rstd[first], drift = rstd * sum / n, slope = rstd * sum_xhat / n;
    for (int64_t c = first; c < first + width; ++c) {
      const double gain = rstd * norm.weight[c];
      out.gain[c] = float(gain);
      out.drift[c] = float(drift);
      out.slope[c] = float(slope * rstd);
      if (d_emb) d_emb[c] = float(gain * work[c] - norm.n_pixels * drift - slope * work[2 * n_channels + c]);
    }
  }
}

MVDREAM_FAST_INLINE void finish(const float* x, Adjoint of, float* d_x, int64_t c, int64_t n) {
  const VecF centred = load_first(x + c, n) - load_first(of.shift + c, n);
  const VecF rest = load_first(of.drift + c, n) + centred * load_first(of.slope + c, n);
  store_first(d_x + c, load_first(d_x + c, n) * load_first(of.gain + c, n) - rest, n);
}

void finish_block(const GroupNorm& norm, const Block& block, Adjoint of, float* d_x) {
  for (int64_t pixel = 0; pixel < block.n_pixels; ++pixel) {
    const int64_t at = block.start + pixel * norm.n_channels;
    int64_t c = 0;
    for (; c + kLanes <= norm.n_channels; c += kLanes) finish(norm.x + at, of, d_x + at, c, kLanes);
    if (c < norm.n_channels) finish(norm.x + at, of, d_x + at, c, norm.n_channels - c);
  }
}

}  // namespace

void group_norm_silu_forward(const GroupNorm& norm, float eps, float* y, float* mean, float* rstd, int n_threads) {
  const int64_t n_channels = norm.n_channels, n_blocks = blocks_of(norm);
  const auto moments = floats(norm.n_images * n_blocks * 2 * n_channels);
  const auto coefficients = floats(norm.n_images * 2 * n_channels);
  const auto work = doubles(norm.n_images * 2 * n_channels);
  const auto affine_of = [&](int64_t image) {
    float* shift = coefficients.get() + image * 2 * n_channels;
    return Affine{shift, shift + n_channels};
  };
  in_three_steps(
      norm, n_threads,
      [&](int64_t, const Block& block) { block_moments(norm, block, moments.get() + block.index * 2 * n_channels); },
      [&](int64_t image) {
        image_affine(norm, moments.get() + image * n_blocks * 2 * n_channels, image, eps,
                     work.get() + image * 2 * n_channels, affine_of(image), mean, rstd);
      },
      [&](int64_t image, const Block& block) {
        (norm.silu ? apply_block<true> : apply_block<false>)(norm, block, affine_of(image), y);
      });
}

void group_norm_silu_backward(const GroupNorm& norm, const float* d_y, const float* mean, const float* rstd, float* d_x,
                              float* d_weight, float* d_bias, float* d_emb, int n_threads) {
  const int64_t n_channels = norm.n_channels, n_blocks = blocks_of(norm);
  const auto sums = floats(norm.n_images * n_blocks * 3 * n_channels);
  const auto coefficients = floats(norm.n_images * 5 * n_channels);
  const auto work = doubles(norm.n_images * 3 * n_channels);
  const auto adjoint_of = [&](int64_t i) { return Adjoint(coefficients.get() + i * 5 * n_channels, n_channels); };
  for (int64_t image = 0; image < norm.n_images; ++image) image_shifts(norm, image, mean, rstd, adjoint_of(image));
  in_three_steps(
      norm, n_threads,
      [&](int64_t image, const Block& block) {
        (norm.silu ? adjoint_block<true> : adjoint_block<false>)(norm, block, d_y, adjoint_of(image), d_x,
                                                                 sums.get() + block.index * 3 * n_channels);
      },
      [&](int64_t image) {
        image_adjoint(norm, sums.get() + image * n_blocks * 3 * n_channels, work.get() + image * 3 * n_channels,
                      adjoint_of(image), d_emb ? d_emb + image * n_channels : nullptr);
      },
      [&](int64_t image, const Block& block) { finish_block(norm, block, adjoint_of(image), d_x); });
  for (int64_t c = 0; c < n_channels; ++c) {
    double bias = 0, weight = 0;
    for (int64_t image = 0; image < norm.n_images; ++image) {
      bias += work[image * 3 * n_channels + c];
      weight += work[image * 3 * n_channels + n_channels + c];
    }
    d_bias[c] = float(bias);
    d_weight[c] = float(weight);
  }
}

}  // namespace MVDREAM_FAST_ISA
}  // namespace mvdream_fast
