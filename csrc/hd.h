// What lets one source of maths serve the host compilers and nvcc.
//
// Shared headers put their functions into namespace mvdream_fast::MVDREAM_FAST_ISA, so that a copy compiled for one
// instruction set (or for a GPU) is never merged into another by the linker.
#pragma once

#include <cstdint>

#ifndef MVDREAM_FAST_ISA
#define MVDREAM_FAST_ISA device
#endif

#ifdef __CUDACC__
#define MVDREAM_FAST_HD __host__ __device__ inline
#else
#define MVDREAM_FAST_HD inline
#endif
