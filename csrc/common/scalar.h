// Element types that an op may meet, and their conversions. Plain C++: nvcc, g++ and the CPU runner of the tests read it.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define PRFL_INLINE __host__ __device__ __forceinline__
#else
#define PRFL_INLINE inline __attribute__((always_inline))
#endif

namespace prfl {

// The numbers are the ones that prfl_fast/ops/dtypes.py hands over.
enum class Scalar : int { f32 = 0, f64 = 1, f16 = 2, bf16 = 3 };

struct Half {
  uint16_t bits;
};

struct BFloat16 {
  uint16_t bits;
};

namespace detail {

template <typename To, typename From>
PRFL_INLINE To bit_cast(From value) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To result;
  memcpy(&result, &value, sizeof(To));
  return result;
}

}  // namespace detail

PRFL_INLINE float widen(float value) { return value; }
PRFL_INLINE double widen(double value) { return value; }

PRFL_INLINE float widen(BFloat16 value) { return detail::bit_cast<float>(static_cast<uint32_t>(value.bits) << 16); }

PRFL_INLINE float widen(Half value) {
#ifdef __CUDA_ARCH__
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(value.bits));
  return result;
#else
  // Sign and the other 15 bits in float's places; 2^112 moves the exponent's bias from 15 to 127, subnormals too.
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
  const uint32_t rest = static_cast<uint32_t>(value.bits & 0x7FFFu) << 13;
  const float scaled = detail::bit_cast<float>(rest) * 5.192296858534828e33f;
  // Infinity and NaN have all exponent bits set, which no scaling gives.
  const uint32_t special = rest | 0x7F800000u;
  return detail::bit_cast<float>(sign | (rest >= 0x0F800000u ? special : detail::bit_cast<uint32_t>(scaled)));
#endif
}

// Rounds to nearest, ties to even; by way of float, as torch does.
template <typename To>
PRFL_INLINE To narrow(float value);
template <typename To>
PRFL_INLINE To narrow(double value);

template <>
PRFL_INLINE float narrow<float>(float value) {
  return value;
}
template <>
PRFL_INLINE float narrow<float>(double value) {
  return static_cast<float>(value);
}
template <>
PRFL_INLINE double narrow<double>(float value) {
  return value;
}
template <>
PRFL_INLINE double narrow<double>(double value) {
  return value;
}

template <>
PRFL_INLINE BFloat16 narrow<BFloat16>(float value) {
  const uint32_t bits = detail::bit_cast<uint32_t>(value);
  const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  return BFloat16{static_cast<uint16_t>(value != value ? 0x7FC0u : rounded)};
}

template <>
PRFL_INLINE Half narrow<Half>(float value) {
#ifdef __CUDA_ARCH__
  Half result;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
  return result;
#else
  const uint32_t bits = detail::bit_cast<uint32_t>(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7FFFFFFFu;
  if (magnitude > 0x7F800000u) return Half{static_cast<uint16_t>(sign | 0x7E00u)};
  if (magnitude >= 0x477FF000u) return Half{static_cast<uint16_t>(sign | 0x7C00u)};  // 65520 rounds up to infinity
  if (magnitude < 0x38800000u) {
    // Below 2^-14: adding 0.5 leaves multiples of 2^-24 in the lowest bits, rounded by the addition itself.
    const float shifted = detail::bit_cast<float>(magnitude) + 0.5f;
    return Half{static_cast<uint16_t>(sign | (detail::bit_cast<uint32_t>(shifted) - 0x3F000000u))};
  }
  const uint32_t rounded = magnitude - 0x38000000u + 0x0FFFu + ((magnitude >> 13) & 1u);
  return Half{static_cast<uint16_t>(sign | (rounded >> 13))};
#endif
}

template <>
PRFL_INLINE BFloat16 narrow<BFloat16>(double value) {
  return narrow<BFloat16>(static_cast<float>(value));
}
template <>
PRFL_INLINE Half narrow<Half>(double value) {
  return narrow<Half>(static_cast<float>(value));
}

// The nearest value of a dtype that is no wider than the argument's own, in the argument's own.
PRFL_INLINE double round_to(double value, Scalar) { return value; }
PRFL_INLINE float round_to(float value, Scalar scalar) {
  switch (scalar) {
    case Scalar::f16: return widen(narrow<Half>(value));
    case Scalar::bf16: return widen(narrow<BFloat16>(value));
    default: return value;
  }
}

}  // namespace prfl
