// What this machine allows a field's forward pass at best: a bare level-major gather of the paper's grid, and the bare
// multiply-adds of its two networks on registers. Prints nanoseconds a sample, each the best of several tries.
//
//   c++ -O3 -march=native -std=c++17 -fopenmp -Icsrc benchmarks/machine_limit.cpp -o machine_limit
//   ./machine_limit THREADS [SAMPLES OF A CALL]
//
// A small call shares a level's cache lines among few samples: its limit is higher, by what memory has to deliver.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "hash_grid.h"
#include "simd.h"

using namespace mvdream_fast;
using namespace mvdream_fast::MVDREAM_FAST_ISA;

constexpr int64_t kSamples = int64_t(1) << 20;
constexpr int kMultiplyAdds = 2 * 32 * 64 + 64 * (1 + 3);
constexpr int kTries = 5;

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
    best = std::min(best, took.count() / kSamples);
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

// Every thread goes over all levels for `block` samples at a time.
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
  constexpr int kChains = 10;  // enough to hide the latency of the operation, few enough to stay in registers
  return best_ns([&] {
    double total = 0;
#pragma omp parallel for num_threads(n_threads) schedule(static) reduction(+ : total)
    for (int part = 0; part < 64; ++part) {
      VecF chain[kChains], w = splat(0.999f + 1e-6f * part);
      for (auto& c : chain) c = w;
      const int64_t steps = kSamples / 64 * kMultiplyAdds / (kLanes * kChains);
      for (int64_t i = 0; i < steps; ++i) {
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

int main(int argc, char** argv) {
  const int n_threads = argc > 1 ? std::atoi(argv[1]) : 1;
  const HashGrid grid = paper_grid();
  std::vector<double> table(grid.n_entries(), 1.0);
  std::vector<float> x(3 * kSamples);
  std::mt19937 random(0);
  for (float& value : x) value = std::uniform_real_distribution<float>(0, 1)(random);
  double gathered = 1e30;
  const int64_t whole = kSamples / n_threads;
  const int64_t call = argc > 2 ? std::atoll(argv[2]) / n_threads / kLanes * kLanes : 0;
  for (int64_t block = call > 0 ? call : int64_t(1) << 16; block <= whole; block = call > 0 ? whole + 1 : 2 * block) {
    gathered = std::min(gathered, gather_ns(grid, table, x, block, n_threads));
  }
  const double multiplied = multiply_add_ns(n_threads);
  std::printf("{\"threads\": %d, \"gather_ns\": %.1f, \"multiply_add_ns\": %.1f, \"limit_ns\": %.1f}\n", n_threads,
              gathered, multiplied, gathered + multiplied);
}
