// What this machine allows at best, in 10^9 a second, the best of several tries: multiply-adds on registers (two
// operations each), a copy (bytes read and written), and a bare level-major gather of the paper's grid (bytes
// gathered).
//
//   c++ -O3 -march=native -std=c++17 -fopenmp -Icsrc benchmarks/machine_limit.cpp -o machine_limit
//   ./machine_limit multiply_add THREADS | copy THREADS BYTES | gather THREADS [SAMPLES OF A CALL]
//
// Small arrays are copied in a cache. A small gather shares a level's cache lines among few samples, so that memory has
// more to deliver for each.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "hash_grid.h"
#include "simd.h"

using namespace mvdream_fast;
using namespace mvdream_fast::MVDREAM_FAST_ISA;

constexpr int64_t kSamples = int64_t(1) << 19;
constexpr int kMultiplyAdds = 1024;  // for each sample of the gather
constexpr int kTries = 10;           // short ones: on a busy machine the best is one that nothing interrupted

static volatile double sink;

static HashGrid paper_grid() {
  HashGrid grid;
  grid.n_levels = 16;
  grid.n_features = 2;
  int64_t offset = 0;
  for (int l = 0; l < grid.n_levels; ++l) {
    const float scale = 16 * std::pow(1.447269237440378, l) - 1;
    const uint32_t side = uint32_t(std::ceil(scale)) + 1;
    const uint64_t dense = uint64_t(side) * side * side;
    const uint32_t size = uint32_t(std::min<uint64_t>((dense + 7) / 8 * 8, 1 << 19));
    grid.levels[l] = {scale, side, size, offset, dense > size};
    offset += size;
  }
  return grid;
}

template <typename Work>
static double best_ns(Work work) {
  double best = 1e30;
  for (int i = 0; i < kTries; ++i) {
    const auto start = std::chrono::steady_clock::now();
    work();
    const std::chrono::duration<double, std::nano> took = std::chrono::steady_clock::now() - start;
    best = std::min(best, took.count());
  }
  return best;
}

// The sum of the 8 vertices' entries, 8 bytes each, of kLanes samples: addresses, loads and one addition a load.
template <bool kHashed>
static VecD gather(GridLevel level, const double* entries, const float* x) {
  level.hashed = kHashed;
  VecU cell[3];
  for (int axis = 0; axis < 3; ++axis) {
    cell[axis] = (VecU)truncate(load(x + axis * kSamples) * level.scale + 0.5f);
  }
  alignas(64) uint32_t index[8][kLanes];
  cell_indices<VecU>(level, cell[0], cell[1], cell[2],
                     [&](int corner, VecU i) { std::memcpy(index[corner], &i, sizeof i); });
  VecD sum = {};
  for (int corner = 0; corner < 8; ++corner) {
    VecD low, high;
    for (int i = 0; i < kLanes / 2; ++i) {
      low[i] = entries[index[corner][i]];
      high[i] = entries[index[corner][i + kLanes / 2]];
    }
    sum += low + high;
  }
  return sum;
}

// Nanoseconds of all samples; every thread goes over all levels for `block` of them at a time.
static double gather_ns(const HashGrid& grid, const std::vector<double>& table, const std::vector<float>& x,
                        int64_t block, int n_threads) {
  return best_ns([&] {
    double total = 0;
#pragma omp parallel for num_threads(n_threads) schedule(static) reduction(+ : total)
    for (int64_t begin = 0; begin < kSamples; begin += block) {
      VecD sum = {};
      for (int l = 0; l < grid.n_levels; ++l) {
        const GridLevel& level = grid.levels[l];
        const double* entries = table.data() + level.offset;
        for (int64_t s = begin; s < std::min(begin + block, kSamples); s += kLanes) {
          sum += level.hashed ? gather<true>(level, entries, &x[s]) : gather<false>(level, entries, &x[s]);
        }
      }
      for (int i = 0; i < kLanes / 2; ++i) total += sum[i];
    }
    sink = total;
  });
}

static double multiply_add_ns(int n_threads) {
  constexpr int kChains = 12;  // enough to hide the latency of the operation, few enough to stay in registers
  return best_ns([&] {
    double total = 0;
#pragma omp parallel for num_threads(n_threads) schedule(static) reduction(+ : total)
    for (int part = 0; part < 64; ++part) {
      VecF chain[kChains], w = splat(0.999f + 1e-6f * part);
      for (auto& c : chain) c = w;
      const int64_t steps = kSamples / 64 * kMultiplyAdds / (kLanes * kChains);
      for (int64_t i = 0; i < steps; ++i) {
#pragma GCC unroll 16  // in a loop GCC keeps the chains in memory, which halves the peak
        for (auto& c : chain) {
          c = c * w + w;
          asm volatile("" : "+x"(c));  // keeps the chain in registers and the compiler from folding steps
        }
      }
      for (auto& c : chain) total += c[0];
    }
    sink = total;
  });
}

static double copy_ns(int64_t bytes, int n_threads) {
  std::vector<char> from(bytes / 2, 1), to(bytes / 2, 2);
  const int64_t part = bytes / 2 / n_threads;
  const int64_t repeats = std::max<int64_t>(1, (int64_t(1) << 27) / bytes);
  return best_ns([&] {
#pragma omp parallel for num_threads(n_threads) schedule(static)
           for (int thread = 0; thread < n_threads; ++thread) {
             for (int64_t i = 0; i < repeats; ++i) {
               std::memcpy(to.data() + thread * part, from.data() + thread * part, part);
               asm volatile("" : : "r"(to.data()) : "memory");  // every copy is made
             }
           }
         }) /
         repeats;
}

static double gathered_a_ns(int n_threads, int64_t samples) {
  const HashGrid grid = paper_grid();
  std::vector<double> table(grid.n_entries(), 1.0);
  std::vector<float> x(3 * kSamples);
  std::mt19937 random(0);
  for (float& value : x) value = std::uniform_real_distribution<float>(0, 1)(random);
  const int64_t whole = kSamples / n_threads, call = std::min(whole, samples / n_threads / kLanes * kLanes);
  double best = 1e30;
  for (int64_t block = call > 0 ? call : int64_t(1) << 17; block <= whole; block = call > 0 ? whole + 1 : 4 * block) {
    best = std::min(best, gather_ns(grid, table, x, block, n_threads));
  }
  return double(kSamples) * grid.n_levels * 8 * sizeof(double) / best;
}

int main(int argc, char** argv) {
  const std::string kind = argc > 1 ? argv[1] : "";
  const int n_threads = argc > 2 ? std::atoi(argv[2]) : 1;
  const int64_t size = argc > 3 ? std::atoll(argv[3]) : 0;
  double a_ns = 0;
  if (kind == "multiply_add") a_ns = 2.0 * kSamples * kMultiplyAdds / multiply_add_ns(n_threads);
  if (kind == "copy" && size > n_threads) a_ns = size / copy_ns(size, n_threads);
  if (kind == "gather") a_ns = gathered_a_ns(n_threads, size);
  if (n_threads < 1 || a_ns == 0) {
    std::fprintf(stderr, "usage: machine_limit multiply_add|copy|gather THREADS [SIZE]\n");
    return 2;
  }
  std::printf("{\"g_s\": %.2f}\n", a_ns);
}
