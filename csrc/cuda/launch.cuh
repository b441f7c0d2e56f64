// What every CUDA file shares: checked calls and launches on a given stream, scratch memory in the stream's order, and
// the few collectives of a warp. Nothing here knows an op.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

// Memory that a launch asks for by its size; tests compile the same source for the host, where it is a plain array.
#ifdef __CUDACC__
#define MVDREAM_FAST_DYNAMIC_SHARED(type, name) extern __shared__ __align__(16) type name[]
#else
#define MVDREAM_FAST_DYNAMIC_SHARED(type, name) type* name = shim::dynamic_shared<type>()
#endif

namespace mvdream_fast::cuda {

constexpr int kWarp = 32;  // of every GPU that CUDA knows; tests/cuda_shim has the same
constexpr unsigned kAllLanes = 0xffffffffu;

inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string(what) + ": CUDA must succeed, got " + cudaGetErrorString(error) +
                           "; run with CUDA_LAUNCH_BLOCKING=1 to find the launch");
}

// Makes a device current for as long as it lives, as the first thing that an entry point does: streams, launches and
// attributes belong to the current device, and no caller has made the tensors' device current.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    if (device < 0) return;
    int current = 0;
    check(cudaGetDevice(&current), "device");
    if (current == device) return;
    check(cudaSetDevice(device), "device");
    before_ = current;
  }
  ~DeviceGuard() {
    if (before_ >= 0) cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = -1;
};

// Blocks for n items; kernels stride over the grid, so that any n fits the cap.
inline int64_t blocks_for(int64_t n, int64_t per_block, int64_t most = 1 << 16) {
  const int64_t n_blocks = (n + per_block - 1) / per_block;
  return n_blocks < most ? n_blocks : most;
}

template <typename... Parameters, typename... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), int64_t n_blocks, int n_threads, size_t shared_bytes,
            cudaStream_t stream, const Arguments&... arguments) {
  if (n_blocks == 0) return;
  // Above 48 KB a kernel has to be told; the limit itself is the device's and is reported by the call.
  if (shared_bytes > 48 * 1024) {
    check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(shared_bytes)),
          name);
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(n_blocks));
  config.blockDim = dim3(static_cast<unsigned>(n_threads));
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  check(cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...), name);
}

// Bytes of shared memory that one block may have on the current device.
inline size_t shared_limit() {
  int device = 0, bytes = 0;
  check(cudaGetDevice(&device), "device");
  check(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "device");
  return static_cast<size_t>(bytes);
}

// Lets the current device's pool keep so much of what is freed, about two calls' scratch memory: by itself it gives all
// back whenever someone waits for the device, and the next call has to map it anew.
constexpr uint64_t kKeptBytes = 96 << 20;
inline void keep_scratch() {
  thread_local int known = -1;  // the device that this was done for last
  int device = 0;
  check(cudaGetDevice(&device), "device");
  if (device == known) return;
  cudaMemPool_t pool = nullptr;
  uint64_t kept = 0;
  check(cudaDeviceGetDefaultMemPool(&pool, device), "scratch memory");
  check(cudaMemPoolGetAttribute(pool, cudaMemPoolAttrReleaseThreshold, &kept), "scratch memory");
  if (kept < kKeptBytes) {
    kept = kKeptBytes;
    check(cudaMemPoolSetAttribute(pool, cudaMemPoolAttrReleaseThreshold, &kept), "scratch memory");
  }
  known = device;
}

// Memory between kernels of one call, freed in the stream's order.
template <typename T>
class Scratch {
 public:
  Scratch(int64_t n, cudaStream_t stream) : stream_(stream) {
    if (n <= 0) return;
    keep_scratch();
    check(cudaMallocAsync(reinterpret_cast<void**>(&data_), n * sizeof(T), stream), "scratch memory");
  }
  ~Scratch() {
    if (data_ != nullptr) cudaFreeAsync(data_, stream_);
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  T* get() const { return data_; }
  void zero(int64_t n) const {
    if (n > 0) check(cudaMemsetAsync(data_, 0, n * sizeof(T), stream_), "scratch memory");
  }

 private:
  cudaStream_t stream_;
  T* data_ = nullptr;
};

// The first of this thread's items of a loop over n, and the loop's stride.
__device__ inline int64_t thread_index() { return int64_t(blockIdx.x) * blockDim.x + threadIdx.x; }
__device__ inline int64_t n_threads() { return int64_t(gridDim.x) * blockDim.x; }
__device__ inline int64_t warp_index() { return thread_index() / kWarp; }
__device__ inline int64_t n_warps() { return n_threads() / kWarp; }
__device__ inline int lane_index() { return static_cast<int>(threadIdx.x) % kWarp; }

template <typename T>
__device__ inline T warp_sum(T value) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(kAllLanes, value, offset);
  return value;
}

// Over this lane and those before it, with the operation's neutral element outside.
template <typename T, typename Operation>
__device__ inline T warp_scan(T value, Operation operation) {
  for (int offset = 1; offset < kWarp; offset *= 2) {
    const T before = __shfl_up_sync(kAllLanes, value, offset);
    if (lane_index() >= offset) value = operation(before, value);
  }
  return value;
}

}  // namespace mvdream_fast::cuda
