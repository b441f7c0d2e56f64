// update_occupancy on GPUs. The mean is a sum over a fixed number of parts in a fixed order, so that the bits do not
// depend on the GPU; cells are raised by a maximum, which no order of the threads changes.
#include "cuda/launch.cuh"
#include "cuda/ops.h"
#include "occupancy.h"

namespace mvdream_fast::cuda {
namespace {

using namespace device;

constexpr int kThreads = 256, kParts = 64;

__global__ void decay_all_kernel(const float* ema, const float* values, int64_t n_cells, float decay, float* new_ema) {
  for (int64_t i = thread_index(); i < n_cells; i += n_threads()) {
    new_ema[i] = values ? raised(decayed(ema[i], decay), values[i]) : ema[i];
  }
}

// From the old value, so that a cell given twice decays once; both of its threads write the same.
__global__ void decay_cells_kernel(const float* ema, const int64_t* cells, int64_t n, float decay, float* new_ema) {
  for (int64_t i = thread_index(); i < n; i += n_threads()) new_ema[cells[i]] = decayed(ema[cells[i]], decay);
}

// Floats that are not negative are ordered as the integers of the same bits.
__global__ void raise_cells_kernel(const float* ema, const float* values, const int64_t* cells, int64_t n,
                                   float* new_ema) {
  for (int64_t i = thread_index(); i < n; i += n_threads()) {
    const float value = values[i];
    int bits;
    memcpy(&bits, &value, sizeof bits);
    if (ema[cells[i]] >= 0 && value > 0) atomicMax(reinterpret_cast<int*>(new_ema + cells[i]), bits);
  }
}

struct Mean {
  double sum, n_seen;
};

__global__ void __launch_bounds__(kThreads)
    mean_parts_kernel(const float* ema, const float* new_ema, int64_t n_cells, Mean* parts) {
  __shared__ Mean of_warp[kThreads / kWarp];
  Mean mean = {0, 0};
  for (int64_t i = thread_index(); i < n_cells; i += n_threads()) {
    if (!(ema[i] >= 0)) continue;
    mean.sum += new_ema[i];
    mean.n_seen += 1;
  }
  mean = {warp_sum(mean.sum), warp_sum(mean.n_seen)};
  if (lane_index() == 0) of_warp[threadIdx.x / kWarp] = mean;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int w = 1; w < kThreads / kWarp; ++w) {
    mean.sum += of_warp[w].sum;
    mean.n_seen += of_warp[w].n_seen;
  }
  parts[blockIdx.x] = mean;
}

__global__ void __launch_bounds__(kThreads)
    bits_kernel(const float* new_ema, int64_t n_cells, const Mean* parts, float threshold, uint8_t* bits) {
  double sum = 0, n_seen = 0;
  for (int i = 0; i < kParts; ++i) {
    sum += parts[i].sum;
    n_seen += parts[i].n_seen;
  }
  const float mean = static_cast<float>(n_seen > 0 ? sum / n_seen : 0.0);
  const float limit = mean < threshold ? mean : threshold;
  for (int64_t i = thread_index(); i < (n_cells + 7) / 8; i += n_threads()) {
    bits[i] = occupancy_byte(new_ema, i, n_cells, limit);
  }
}

}  // namespace

void update_occupancy(const float* ema, int64_t n_cells, const float* values, const int64_t* cells, int64_t n_values,
                      float decay, float threshold, float* new_ema, uint8_t* bits, Queue queue) {
  const DeviceGuard guard(queue.device);
  const char* name = "update occupancy";
  const int64_t of_cells = blocks_for(n_cells, kThreads), of_values = blocks_for(n_values, kThreads);
  launch(name, decay_all_kernel, of_cells, kThreads, 0, queue.stream, ema, cells ? nullptr : values, n_cells, decay,
         new_ema);
  if (cells != nullptr) {
    launch(name, decay_cells_kernel, of_values, kThreads, 0, queue.stream, ema, cells, n_values, decay, new_ema);
    launch(name, raise_cells_kernel, of_values, kThreads, 0, queue.stream, ema, values, cells, n_values, new_ema);
  }
  const Scratch<Mean> parts(kParts, queue.stream);
  launch(name, mean_parts_kernel, kParts, kThreads, 0, queue.stream, ema, new_ema, n_cells, parts.get());
  launch(name, bits_kernel, blocks_for((n_cells + 7) / 8, kThreads), kThreads, 0, queue.stream, new_ema, n_cells,
         parts.get(), threshold, bits);
}

}  // namespace mvdream_fast::cuda
