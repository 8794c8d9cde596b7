// Functions of one thread: arithmetic with fixed rounding, approximations (here: exact), bits, atomics.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "access.h"

// Compile with -ffp-contract=off: these are never fused.
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dsub_rn(double a, double b) { return a - b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __ddiv_rn(double a, double b) { return a / b; }
inline double __fma_rn(double a, double b, double c) { return std::fma(a, b, c); }
using std::fma;

inline float rsqrtf(float a) { return static_cast<float>(1.0 / std::sqrt(static_cast<double>(a))); }
inline double rsqrt(double a) { return 1.0 / std::sqrt(a); }
inline float __frsqrt_rn(float a) { return rsqrtf(a); }
inline float __expf(float a) { return std::exp(a); }
inline float __logf(float a) { return std::log(a); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float a) { return 1.0f / a; }

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }
inline int __clz(int bits) { return bits == 0 ? 32 : __builtin_clz(static_cast<unsigned>(bits)); }

inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline unsigned min(unsigned a, unsigned b) { return a < b ? a : b; }
inline unsigned max(unsigned a, unsigned b) { return a > b ? a : b; }
inline long long min(long long a, long long b) { return a < b ? a : b; }
inline long long max(long long a, long long b) { return a > b ? a : b; }

namespace cuda_on_cpu {

template <typename To, typename From>
To bits_as(From value) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To result;
  std::memcpy(&result, &value, sizeof(To));
  return result;
}

}  // namespace cuda_on_cpu

inline unsigned __float_as_uint(float a) { return cuda_on_cpu::bits_as<unsigned>(a); }
inline int __float_as_int(float a) { return cuda_on_cpu::bits_as<int>(a); }
inline float __uint_as_float(unsigned a) { return cuda_on_cpu::bits_as<float>(a); }
inline float __int_as_float(int a) { return cuda_on_cpu::bits_as<float>(a); }

// In global or shared memory. int, unsigned, unsigned long long, float, double.
template <typename T>
T atomicAdd(T* to, T value, cuda_on_cpu::Site site = cuda_on_cpu::Site::here()) {
  return cuda_on_cpu::atomic(to, [value](T before) { return static_cast<T>(before + value); }, site);
}
template <typename T>
T atomicMax(T* to, T value, cuda_on_cpu::Site site = cuda_on_cpu::Site::here()) {
  return cuda_on_cpu::atomic(to, [value](T before) { return before < value ? value : before; }, site);
}
template <typename T>
T atomicExch(T* to, T value, cuda_on_cpu::Site site = cuda_on_cpu::Site::here()) {
  return cuda_on_cpu::atomic(to, [value](T) { return value; }, site);
}
template <typename T>
T atomicCAS(T* to, T expected, T value, cuda_on_cpu::Site site = cuda_on_cpu::Site::here()) {
  return cuda_on_cpu::atomic(to, [=](T before) { return before == expected ? value : before; }, site);
}
