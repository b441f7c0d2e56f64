// Stands in for CUDA's header where csrc/cuda is compiled for the host, so that its kernels run in tests without a GPU.
//
// A block's threads are coroutines of one system thread: each runs until a barrier or a warp collective and hands over
// to the next, so that a missing barrier or a race shows up as results that depend on the order of the threads, which
// MVDREAM_FAST_SHIM_ORDER=reverse turns around. Blocks run one after the other. Shared memory starts as NaNs, and a
// barrier that some thread never reaches is an error instead of a hang. What this cannot show: memory ordering between
// blocks, alignment faults (UBSan does), and speed.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define __global__
#define __host__
#define __device__
#define __shared__ static
#define __forceinline__ inline
#define __align__(n) alignas(n)
#define __grid_constant__
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

// AddressSanitizer must be told when the stack changes: it keeps bounds of its own.
#ifdef __SANITIZE_ADDRESS__
extern "C" void __sanitizer_start_switch_fiber(void** own_save, const void* stack, size_t size);
extern "C" void __sanitizer_finish_switch_fiber(void* own_save, const void** old_stack, size_t* old_size);
#else
inline void __sanitizer_start_switch_fiber(void**, const void*, size_t) {}
inline void __sanitizer_finish_switch_fiber(void*, const void**, size_t*) {}
#endif

namespace shim {

constexpr int kLanesOfWarp = 32;
constexpr size_t kStack = 256 << 10;

struct Barrier {
  int waiting = 0;
  int64_t generation = 0;
};
struct Warp {
  Barrier barrier;
  char slots[kLanesOfWarp][64];
};
// A coroutine that lives from one block to the next. Only its first start goes through ucontext, whose switches cost
// system calls; later ones jump.
struct Thread {
  ucontext_t context;
  jmp_buf place;
  std::unique_ptr<char[]> stack;
  void* sanitizer = nullptr;
  bool started = false, done = false;
};

struct Block {
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::vector<char> shared;
  std::function<void()> body;
  jmp_buf scheduler;
  const void* scheduler_stack = nullptr;
  size_t scheduler_stack_size = 0;
  void* scheduler_sanitizer = nullptr;
  Barrier all;
  int current = 0;
  int64_t progress = 0;
};
inline Block block;

inline void to_scheduler() {
  Thread* own = &block.threads[block.current];
  if (_setjmp(own->place) == 0) {
    __sanitizer_start_switch_fiber(&own->sanitizer, block.scheduler_stack, block.scheduler_stack_size);
    _longjmp(block.scheduler, 1);
  }
  __sanitizer_finish_switch_fiber(block.threads[block.current].sanitizer, nullptr, nullptr);
}

inline void entry() {
  __sanitizer_finish_switch_fiber(nullptr, &block.scheduler_stack, &block.scheduler_stack_size);
  for (;;) {
    block.body();
    block.threads[block.current].done = true;
    ++block.progress;
    to_scheduler();
  }
}

inline void resume(Thread* thread) {
  if (!thread->started) thread->stack.reset(new char[kStack]);
  if (_setjmp(block.scheduler) != 0) {
    return __sanitizer_finish_switch_fiber(block.scheduler_sanitizer, nullptr, nullptr);
  }
  __sanitizer_start_switch_fiber(&block.scheduler_sanitizer, thread->stack.get(), kStack);
  if (thread->started) _longjmp(thread->place, 1);
  thread->started = true;
  getcontext(&thread->context);
  thread->context.uc_stack.ss_sp = thread->stack.get();
  thread->context.uc_stack.ss_size = kStack;
  thread->context.uc_link = nullptr;
  makecontext(&thread->context, entry, 0);
  setcontext(&thread->context);
}

inline void wait(Barrier* barrier, int expected) {
  const int64_t generation = barrier->generation;
  if (++barrier->waiting == expected) {
    barrier->waiting = 0;
    ++barrier->generation;
    ++block.progress;
  }
  while (barrier->generation == generation) to_scheduler();
}

inline Warp& warp() { return block.warps[block.current / kLanesOfWarp]; }
inline int lane() { return block.current % kLanesOfWarp; }
inline void wait_warp(unsigned mask) { wait(&warp().barrier, __builtin_popcount(mask)); }

// Every lane of the mask shows its value; `read` sees all of them, lane by lane.
template <typename T, typename Read>
auto exchange(unsigned mask, const T& value, Read read) {
  static_assert(sizeof(T) <= sizeof(Warp::slots[0]), "slot too small");
  Warp& own = warp();
  std::memcpy(own.slots[lane()], &value, sizeof value);
  wait_warp(mask);
  const auto result = read([&own](int source) {
    T other;
    std::memcpy(&other, own.slots[source], sizeof other);
    return other;
  });
  wait_warp(mask);
  return result;
}

template <typename T>
T* dynamic_shared() {
  return reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(block.shared.data()) + 127) / 128 * 128);
}

inline bool reversed() {
  const char* order = std::getenv("MVDREAM_FAST_SHIM_ORDER");
  return order != nullptr && std::strcmp(order, "reverse") == 0;
}

// Runs the threads of one block to their ends; false when they wait for each other forever.
inline bool run_block(int n_threads, size_t shared_bytes) {
  block.shared.assign(shared_bytes + 256, '\xff');
  block.warps.assign((n_threads + kLanesOfWarp - 1) / kLanesOfWarp, Warp());
  if (int(block.threads.size()) < n_threads) block.threads.resize(n_threads);
  block.all = Barrier();
  for (Thread& thread : block.threads) thread.done = false;
  const bool backwards = reversed();
  for (bool running = true; running;) {
    running = false;
    const int64_t before = block.progress;
    for (int i = 0; i < n_threads; ++i) {
      block.current = backwards ? n_threads - 1 - i : i;
      if (block.threads[block.current].done) continue;
      running = true;
      threadIdx = dim3(block.current, 0, 0);
      resume(&block.threads[block.current]);
    }
    if (running && block.progress == before) return block.threads.clear(), false;
  }
  return true;
}

}  // namespace shim

using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0, cudaErrorLaunchFailure = 719, cudaErrorMemoryAllocation = 2,
                      cudaErrorInvalidDevice = 101;
constexpr int cudaFuncAttributeMaxDynamicSharedMemorySize = 8;
struct CUstream_st;
using cudaStream_t = CUstream_st*;
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorLaunchFailure ? "threads of a block waiting at different barriers" : "an error";
}
inline cudaError_t cudaFuncSetAttribute(const void*, int, int bytes) {
  return bytes <= 99 * 1024 ? cudaSuccess : cudaErrorMemoryAllocation;
}
// A small GPU's limit makes large networks take the way without staging.
constexpr int cudaDevAttrMaxSharedMemoryPerBlockOptin = 97;
// Several devices that share the host's memory, to see which one an op makes current.
namespace shim {
constexpr int kDevices = 4;
inline int device = 0, launched_on = -1;
inline int64_t syncs = 0;
}  // namespace shim
inline cudaError_t cudaGetDevice(int* device) { return *device = shim::device, cudaSuccess; }
inline cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= shim::kDevices) return cudaErrorInvalidDevice;
  return shim::device = device, cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, int, int) { return *value = 99 * 1024, cudaSuccess; }
struct CUmemPool_st;
using cudaMemPool_t = CUmemPool_st*;
constexpr int cudaMemPoolAttrReleaseThreshold = 4;
inline cudaError_t cudaDeviceGetDefaultMemPool(cudaMemPool_t*, int) { return cudaSuccess; }
inline cudaError_t cudaMemPoolGetAttribute(cudaMemPool_t, int, void*) { return cudaSuccess; }
inline cudaError_t cudaMemPoolSetAttribute(cudaMemPool_t, int, void*) { return cudaSuccess; }
inline cudaError_t cudaMallocAsync(void** out, size_t bytes, cudaStream_t) {
  *out = std::malloc(bytes);
  if (*out != nullptr) std::memset(*out, 0xff, bytes);  // NaNs
  return *out == nullptr ? cudaErrorMemoryAllocation : cudaSuccess;
}
inline cudaError_t cudaFreeAsync(void* memory, cudaStream_t) { return std::free(memory), cudaSuccess; }
inline cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t) {
  return std::memset(memory, value, bytes), cudaSuccess;
}
enum cudaMemcpyKind { cudaMemcpyDeviceToHost };
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t) {
  return std::memcpy(to, from, bytes), cudaSuccess;
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return ++shim::syncs, cudaSuccess; }

template <typename... Parameters>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Parameters... arguments) {
  shim::launched_on = shim::device;
  gridDim = config->gridDim;
  blockDim = config->blockDim;
  shim::block.body = [&] { kernel(arguments...); };
  for (unsigned i = 0; i < gridDim.x; ++i) {
    blockIdx = dim3(shim::reversed() ? gridDim.x - 1 - i : i, 0, 0);
    if (!shim::run_block(int(blockDim.x), config->dynamicSmemBytes)) return cudaErrorLaunchFailure;
  }
  return cudaSuccess;
}

inline void __syncthreads() { shim::wait(&shim::block.all, int(blockDim.x)); }
inline void __syncwarp(unsigned mask = 0xffffffffu) { shim::wait_warp(mask); }

template <typename T>
T __shfl_sync(unsigned mask, T value, int source) {
  return shim::exchange(mask, value, [&](auto of) { return of(source % 32); });
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int bits) {
  return __shfl_sync(mask, value, shim::lane() ^ bits);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, int delta) {
  return __shfl_sync(mask, value, std::min(shim::lane() + delta, 31));
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, int delta) {
  return __shfl_sync(mask, value, shim::lane() >= delta ? shim::lane() - delta : shim::lane());
}
inline unsigned __ballot_sync(unsigned mask, bool vote) {
  return shim::exchange(mask, vote, [&](auto of) {
    unsigned votes = 0;
    for (int i = 0; i < 32; ++i) votes |= (mask >> i & 1) && of(i) ? 1u << i : 0u;
    return votes;
  });
}

// One system thread runs everything, so that plain arithmetic is atomic.
template <typename T>
T atomicAdd(T* address, T value) {
  const T old = *address;
  *address = old + value;
  return old;
}
inline float2 atomicAdd(float2* address, float2 value) {
  const float2 old = *address;
  return *address = {old.x + value.x, old.y + value.y}, old;
}
inline float4 atomicAdd(float4* address, float4 value) {
  const float4 old = *address;
  return *address = {old.x + value.x, old.y + value.y, old.z + value.z, old.w + value.w}, old;
}
template <typename T>
T atomicMax(T* address, T value) {
  const T old = *address;
  *address = std::max(old, value);
  return old;
}
template <typename T>
T atomicMin(T* address, T value) {
  const T old = *address;
  *address = std::min(old, value);
  return old;
}
template <typename T>
T __ldg(const T* address) {
  return *address;
}
