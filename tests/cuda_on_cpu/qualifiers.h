// Words and types of the CUDA language that a C++ compiler does not know.
#pragma once

#include "block.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(bytes) __attribute__((aligned(bytes)))

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
using uint3 = cuda_on_cpu::Index3;

#define threadIdx (::cuda_on_cpu::Block::current->index)
#define blockIdx (::cuda_on_cpu::Block::running->index)
#define blockDim (::cuda_on_cpu::Block::running->size)
#define gridDim (::cuda_on_cpu::Block::running->grid)

// type, element, alignments of the vectors of 2 and of 4
#define CUDA_ON_CPU_VECTORS(name, element, align2, align4)                                             \
  struct alignas(align2) name##2 {                                                                     \
    element x, y;                                                                                      \
  };                                                                                                   \
  struct alignas(align4) name##4 {                                                                     \
    element x, y, z, w;                                                                                \
  };                                                                                                   \
  inline name##2 make_##name##2(element x, element y) { return {x, y}; }                               \
  inline name##4 make_##name##4(element x, element y, element z, element w) { return {x, y, z, w}; }
CUDA_ON_CPU_VECTORS(char, signed char, 2, 4)
CUDA_ON_CPU_VECTORS(uchar, unsigned char, 2, 4)
CUDA_ON_CPU_VECTORS(short, short, 4, 8)
CUDA_ON_CPU_VECTORS(ushort, unsigned short, 4, 8)
CUDA_ON_CPU_VECTORS(int, int, 8, 16)
CUDA_ON_CPU_VECTORS(uint, unsigned, 8, 16)
CUDA_ON_CPU_VECTORS(float, float, 8, 16)
CUDA_ON_CPU_VECTORS(double, double, 16, 16)
#undef CUDA_ON_CPU_VECTORS
