// Products of small matrices by a whole warp on the tensor cores: ldmatrix and mma.sync, sm_80 and later. All 32 lanes
// call together. With g = lane / 4 and t = lane % 4, the fragments of the PTX manual for m16n8k16:
//
//   a[0..3]   rows g, g + 8, g, g + 8; columns 2t and 2t + 1, from a[2] on 8 more
//   b[0..1]   rows 2t and 2t + 1, in b[1] 8 more; column g
//   d[0..3]   row g, in d[2] and d[3] g + 8; columns 2t, 2t + 1, 2t, 2t + 1
//
// Two elements share a register; the first one is its lower half.
#pragma once

#include <cstdint>

#include "common/scalar.h"

#ifndef PRFL_CUDA_ON_CPU

namespace prfl {

// Four matrices of 8 x 8 elements of 16 bits in shared memory. Lane i gives the address of row i % 8, 16 bytes, of matrix
// i / 8, and gets in to[j] elements 2t and 2t + 1 of row g of matrix j; transposed: of column g.
template <bool kTransposed>
__device__ __forceinline__ void load_matrices(uint32_t (&to)[4], const void* row) {
  const auto from = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  if constexpr (kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(from)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(from)
                 : "memory");
  }
}

// d += a b: 16 x 8 += 16 x 16 times 16 x 8, E is Half or BFloat16.
template <typename E>
__device__ __forceinline__ void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

template <>
__device__ __forceinline__ void multiply_add<Half>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <>
__device__ __forceinline__ void multiply_add<BFloat16>(
    float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

}  // namespace prfl

#endif
