// Device code of the solver step and its transpose: one launch, every tensor read once and written once. No torch here.
#pragma once

#include "common/memory.cuh"
#include "ops/solver_step/linear_map.h"

namespace prfl::solver_step {

constexpr int kThreads = 256;
constexpr int kVector = 4;  // neighbouring elements of one thread: 16 bytes of float
constexpr int kBatch = 4;   // loads of one thread that are under way at a time

template <typename E>
struct alignas(sizeof(E) * kVector < 16 ? sizeof(E) * kVector : 16) Pack {
  E element[kVector];
};

// A whole vector that is known to be aligned.
template <typename E>
__device__ __forceinline__ Pack<E> load_pack(const void* data, int64_t start) {
  return global_load(reinterpret_cast<const Pack<E>*>(static_cast<const E*>(data) + start));
}

// Elements start .. start + count - 1 as T; whole and aligned vectors in loads of up to 16 bytes, others one by one.
template <typename T, typename E>
__device__ __forceinline__ void load_as(const void* data, int64_t start, int count, T (&value)[kVector]) {
  const E* from = static_cast<const E*>(data) + start;
  if (count == kVector && reinterpret_cast<uintptr_t>(from) % alignof(Pack<E>) == 0) {
    const Pack<E> pack = load_pack<E>(data, start);
#pragma unroll
    for (int i = 0; i < kVector; ++i) value[i] = narrow<T>(widen(pack.element[i]));
  } else {
#pragma unroll
    for (int i = 0; i < kVector; ++i) value[i] = i < count ? narrow<T>(widen(global_load(from + i))) : T(0);
  }
}

template <typename T>
__device__ __forceinline__ void load(const Source& source, int64_t start, int count, T (&value)[kVector]) {
  switch (source.scalar) {
    case Scalar::f32: return load_as<T, float>(source.data, start, count, value);
    case Scalar::f64: return load_as<T, double>(source.data, start, count, value);
    case Scalar::f16: return load_as<T, Half>(source.data, start, count, value);
    case Scalar::bf16: return load_as<T, BFloat16>(source.data, start, count, value);
  }
}

template <typename T, typename E>
__device__ __forceinline__ void store_as(void* data, int64_t start, int count, const T (&value)[kVector]) {
  E* to = static_cast<E*>(data) + start;
  if (count == kVector && reinterpret_cast<uintptr_t>(to) % alignof(Pack<E>) == 0) {
    Pack<E> pack;
#pragma unroll
    for (int i = 0; i < kVector; ++i) pack.element[i] = narrow<E>(value[i]);
    global_store(reinterpret_cast<Pack<E>*>(to), pack);
  } else {
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      if (i < count) global_store(to + i, narrow<E>(value[i]));
    }
  }
}

template <typename T>
__device__ __forceinline__ void store(const Target& target, int64_t start, int count, const T (&value)[kVector]) {
  switch (target.scalar) {
    case Scalar::f32: return store_as<T, float>(target.data, start, count, value);
    case Scalar::f64: return store_as<T, double>(target.data, start, count, value);
    case Scalar::f16: return store_as<T, Half>(target.data, start, count, value);
    case Scalar::bf16: return store_as<T, BFloat16>(target.data, start, count, value);
  }
}

// Bits of the mask, one per element of the thread.
__device__ __forceinline__ unsigned load_mask(const Mask& mask, int64_t start, int count) {
  unsigned bits = 0;
  if (mask.dims == 1 && mask.stride[0] == 1) {
    unsigned char value[kVector];
    const uint8_t* from = mask.data + start;
    if (count == kVector && reinterpret_cast<uintptr_t>(from) % sizeof(uint32_t) == 0) {
      const Pack<unsigned char> pack = global_load(reinterpret_cast<const Pack<unsigned char>*>(from));
#pragma unroll
      for (int i = 0; i < kVector; ++i) value[i] = pack.element[i];
    } else {
#pragma unroll
      for (int i = 0; i < kVector; ++i) value[i] = i < count ? global_load(from + i) : 0;
    }
#pragma unroll
    for (int i = 0; i < kVector; ++i) bits |= (value[i] != 0 ? 1u : 0u) << i;
  } else {
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      if (i < count && global_load(mask.data + mask_offset(mask, start + i)) != 0) bits |= 1u << i;
    }
  }
  return bits;
}

// a - b, a + b and a * b that no compiler may fuse: guidance has the reference's roundings.
__device__ __forceinline__ float add(float a, float b) { return __fadd_rn(a, b); }
__device__ __forceinline__ double add(double a, double b) { return __dadd_rn(a, b); }
__device__ __forceinline__ float multiply(float a, float b) { return __fmul_rn(a, b); }
__device__ __forceinline__ double multiply(double a, double b) { return __dmul_rn(a, b); }

// The guided output, in T; arithmetic in O, the dtype of guidance or float for the narrower ones.
template <typename T, typename O>
__device__ __forceinline__ void guide(const LinearMap& map, int64_t start, int count, T (&value)[kVector]) {
  O conditional[kVector], unconditional[kVector];
  load(map.term[map.guided], start, count, conditional);
  load(map.second, start, count, unconditional);
  const Scalar rounded = map.guidance_scalar;
  const O guidance = static_cast<O>(map.guidance);
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    const O from = round_to(unconditional[i], rounded);
    const O apart = round_to(add(round_to(conditional[i], rounded), -from), rounded);
    value[i] = static_cast<T>(round_to(add(from, round_to(multiply(guidance, apart), rounded)), rounded));
  }
}

// Gradients of both outputs from that of the guided one; arithmetic as above.
template <typename T, typename O>
__device__ __forceinline__ void split(const LinearMap& map, int64_t start, int count, const T (&value)[kVector]) {
  O conditional[kVector], rest[kVector];
  const Scalar rounded = map.guidance_scalar;
  const O guidance = static_cast<O>(map.guidance);
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    const O whole = round_to(static_cast<O>(value[i]), rounded);
    conditional[i] = round_to(multiply(whole, guidance), rounded);
    rest[i] = round_to(add(whole, -conditional[i]), rounded);
  }
  store(map.row[map.guided], start, count, conditional);
  store(map.extra, start, count, rest);
}

template <int kRows>
using Sums = double[kRows][kVector];

// sum[r] += coefficient[t][r] * value, fused. A term that does not count is not multiplied by zero: it may be infinite.
template <typename T, int kRows>
__device__ __forceinline__ void accumulate(const LinearMap& map, int t, const T (&value)[kVector], Sums<kRows>& sum) {
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const double coefficient = map.coefficient[t][r];
    if (coefficient != 0.0) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) sum[r][i] = fma(coefficient, static_cast<double>(value[i]), sum[r][i]);
    }
  }
}

// T: dtype of the state. kRows: at least map.rows; rows beyond it cost registers only.
template <typename T, int kRows, bool kTransposed>
__global__ void __launch_bounds__(kThreads) solver_step_kernel(const __grid_constant__ LinearMap map) {
  const int64_t start = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kVector;
  if (start >= map.length) return;
  const int count = map.length - start < kVector ? static_cast<int>(map.length - start) : kVector;
  const bool masked = map.mask.data != nullptr;
  const unsigned changes = masked ? load_mask(map.mask, start, count) : ~0u;
  const bool has_second = map.second.data != nullptr;

  // From -0: the first fused product is then the product itself, its sign of zero included.
  Sums<kRows> sum;
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
#pragma unroll
    for (int i = 0; i < kVector; ++i) sum[r][i] = -0.0;
  }

  int t = 0;
  T held[kVector];  // term 0 as it is: x, or its cotangent
  if (masked || (kTransposed && has_second)) {
    T value[kVector];
    load(map.term[0], start, count, value);
    if (kTransposed && has_second) {
      T other[kVector];
      load(map.second, start, count, other);
#pragma unroll
      for (int i = 0; i < kVector; ++i) value[i] = add(value[i], other[i]);
    }
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      held[i] = value[i];
      if (kTransposed && !(changes >> i & 1u)) value[i] = T(0);
    }
    accumulate<T, kRows>(map, 0, value, sum);
    t = 1;
  }
  if (count == kVector) {
    // All loads of a batch are under way before the first of them is used.
    for (; t < map.plain; t += kBatch) {
      Pack<T> pack[kBatch];
#pragma unroll
      for (int k = 0; k < kBatch; ++k) {
        if (t + k < map.plain) pack[k] = load_pack<T>(map.term[t + k].data, start);
      }
#pragma unroll
      for (int k = 0; k < kBatch; ++k) {
        if (t + k < map.plain) accumulate<T, kRows>(map, t + k, pack[k].element, sum);
      }
    }
    if (map.plain > 0 && t > map.plain) t = map.plain;
  }
#pragma unroll 1
  for (; t < map.terms; ++t) {
    T value[kVector];
    if (!kTransposed && has_second && t == map.guided) {
      guides_in<T>(map) ? guide<T, T>(map, start, count, value) : guide<T, float>(map, start, count, value);
    } else {
      load(map.term[t], start, count, value);
    }
    accumulate<T, kRows>(map, t, value, sum);
  }

  const bool splits = kTransposed && map.extra.data != nullptr;
  T whole[kVector];  // the guided output's gradient: split once, behind the loop, not in each of its copies
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    if (r < map.rows) {
      T result[kVector];
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        result[i] = static_cast<T>(sum[r][i]);
        if (masked && r == 0) {
          const bool change = changes >> i & 1u;
          if (kTransposed) {
            result[i] = add(result[i], change ? T(0) : held[i]);
          } else if (!change) {
            result[i] = held[i];
          }
        }
      }
      if (splits && r == map.guided) {
#pragma unroll
        for (int i = 0; i < kVector; ++i) whole[i] = result[i];
      } else {
        if (!kTransposed && map.extra.data != nullptr && r == 0) store(map.extra, start, count, result);
        store(map.row[r], start, count, result);
      }
    }
  }
  if (splits) {
    guides_in<T>(map) ? split<T, T>(map, start, count, whole) : split<T, float>(map, start, count, whole);
  }
}

}  // namespace prfl::solver_step
