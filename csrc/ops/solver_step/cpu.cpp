// The solver step on the CPU: tiles that fit the first-level cache, the same fused products as on a GPU. No torch here.
#include <algorithm>
#include <cmath>

#include "ops/solver_step/launch.h"

namespace prfl::solver_step {
namespace {

constexpr int kTile = 256;

template <typename T, typename E>
PRFL_INLINE void load_as(const void* data, int64_t start, int count, T* value) {
  const E* from = static_cast<const E*>(data) + start;
  for (int i = 0; i < count; ++i) value[i] = narrow<T>(widen(from[i]));
}

template <typename T>
PRFL_INLINE void load(const Source& source, int64_t start, int count, T* value) {
  switch (source.scalar) {
    case Scalar::f32: return load_as<T, float>(source.data, start, count, value);
    case Scalar::f64: return load_as<T, double>(source.data, start, count, value);
    case Scalar::f16: return load_as<T, Half>(source.data, start, count, value);
    case Scalar::bf16: return load_as<T, BFloat16>(source.data, start, count, value);
  }
}

template <typename T, typename E>
PRFL_INLINE void store_as(void* data, int64_t start, int count, const T* value) {
  E* to = static_cast<E*>(data) + start;
  for (int i = 0; i < count; ++i) to[i] = narrow<E>(value[i]);
}

template <typename T>
PRFL_INLINE void store(const Target& target, int64_t start, int count, const T* value) {
  switch (target.scalar) {
    case Scalar::f32: return store_as<T, float>(target.data, start, count, value);
    case Scalar::f64: return store_as<T, double>(target.data, start, count, value);
    case Scalar::f16: return store_as<T, Half>(target.data, start, count, value);
    case Scalar::bf16: return store_as<T, BFloat16>(target.data, start, count, value);
  }
}

template <typename O, Scalar kRounded>
PRFL_INLINE void guide_as(O guidance, int count, const O* conditional, O* value) {
  for (int i = 0; i < count; ++i) {
    const O unconditional = round_to(value[i], kRounded);
    const O apart = round_to(round_to(conditional[i], kRounded) - unconditional, kRounded);
    value[i] = round_to(unconditional + round_to(guidance * apart, kRounded), kRounded);
  }
}

// g, and the unconditional output's gradient after it.
template <typename O, Scalar kRounded>
PRFL_INLINE void split_as(O guidance, int count, O* value, O* rest) {
  for (int i = 0; i < count; ++i) {
    const O whole = round_to(value[i], kRounded);
    value[i] = round_to(whole * guidance, kRounded);
    rest[i] = round_to(whole - value[i], kRounded);
  }
}

// The guided output, in T; arithmetic in O.
template <typename T, typename O>
PRFL_INLINE void guide(const LinearMap& map, int64_t start, int count, T* value) {
  O conditional[kTile], guided[kTile];
  load(map.term[map.guided], start, count, conditional);
  load(map.second, start, count, guided);
  const O guidance = static_cast<O>(map.guidance);
  switch (map.guidance_scalar) {
    case Scalar::f16: guide_as<O, Scalar::f16>(guidance, count, conditional, guided); break;
    case Scalar::bf16: guide_as<O, Scalar::bf16>(guidance, count, conditional, guided); break;
    default: guide_as<O, Scalar::f32>(guidance, count, conditional, guided);
  }
  for (int i = 0; i < count; ++i) value[i] = static_cast<T>(guided[i]);
}

// Gradients of both outputs from that of the guided one; arithmetic in O.
template <typename T, typename O>
PRFL_INLINE void split(const LinearMap& map, int64_t start, int count, const T* value) {
  O conditional[kTile], rest[kTile];
  for (int i = 0; i < count; ++i) conditional[i] = static_cast<O>(value[i]);
  const O guidance = static_cast<O>(map.guidance);
  switch (map.guidance_scalar) {
    case Scalar::f16: split_as<O, Scalar::f16>(guidance, count, conditional, rest); break;
    case Scalar::bf16: split_as<O, Scalar::bf16>(guidance, count, conditional, rest); break;
    default: split_as<O, Scalar::f32>(guidance, count, conditional, rest);
  }
  store(map.row[map.guided], start, count, conditional);
  store(map.extra, start, count, rest);
}

template <typename T, bool kTransposed>
PRFL_INLINE void run_tile(const LinearMap& map, int64_t start, int count) {
  double sum[kMaxTerms][kTile];
  T value[kTile], other[kTile], held[kTile];
  bool change[kTile];
  const bool masked = map.mask.data != nullptr;
  if (masked) {
    for (int i = 0; i < count; ++i) change[i] = map.mask.data[mask_offset(map.mask, start + i)] != 0;
  }
  // From -0: the first fused product is then the product itself, its sign of zero included.
  for (int r = 0; r < map.rows; ++r) std::fill_n(sum[r], count, -0.0);

  for (int t = 0; t < map.terms; ++t) {
    if (!kTransposed && map.second.data != nullptr && t == map.guided) {
      guides_in<T>(map) ? guide<T, T>(map, start, count, value) : guide<T, float>(map, start, count, value);
    } else {
      load(map.term[t], start, count, value);
    }
    if (kTransposed && map.second.data != nullptr && t == 0) {
      load(map.second, start, count, other);
      for (int i = 0; i < count; ++i) value[i] = value[i] + other[i];
    }
    if (masked && t == 0) {
      for (int i = 0; i < count; ++i) {
        held[i] = value[i];
        if (kTransposed && !change[i]) value[i] = T(0);
      }
    }
    for (int r = 0; r < map.rows; ++r) {
      const double coefficient = map.coefficient[t][r];
      // A term that does not count is not multiplied by zero: it may be infinite.
      if (coefficient == 0.0) continue;
      double* into = sum[r];
      for (int i = 0; i < count; ++i) into[i] = std::fma(coefficient, static_cast<double>(value[i]), into[i]);
    }
  }

  for (int r = 0; r < map.rows; ++r) {
    for (int i = 0; i < count; ++i) value[i] = static_cast<T>(sum[r][i]);
    if (masked && r == 0) {
      for (int i = 0; i < count; ++i) {
        if (kTransposed) {
          value[i] = value[i] + (change[i] ? T(0) : held[i]);
        } else {
          value[i] = change[i] ? value[i] : held[i];
        }
      }
    }
    if (kTransposed && map.extra.data != nullptr && r == map.guided) {
      guides_in<T>(map) ? split<T, T>(map, start, count, value) : split<T, float>(map, start, count, value);
      continue;
    }
    if (!kTransposed && map.extra.data != nullptr && r == 0) store(map.extra, start, count, value);
    store(map.row[r], start, count, value);
  }
}

template <typename T, bool kTransposed>
PRFL_INLINE void run_tiles(const LinearMap& map, int64_t start, int64_t stop) {
  for (int64_t at = start; at < stop; at += kTile) {
    run_tile<T, kTransposed>(map, at, static_cast<int>(std::min<int64_t>(kTile, stop - at)));
  }
}

PRFL_INLINE void run_all(const LinearMap& map, Scalar state, bool transposed, int64_t start, int64_t stop) {
  if (state == Scalar::f64) {
    transposed ? run_tiles<double, true>(map, start, stop) : run_tiles<double, false>(map, start, stop);
  } else {
    transposed ? run_tiles<float, true>(map, start, stop) : run_tiles<float, false>(map, start, stop);
  }
}

#if defined(__x86_64__)
// std::fma is one instruction here, and in vectors; elsewhere it is a call with the same result.
__attribute__((target("avx2,fma"))) void run_fma(
    const LinearMap& map, Scalar state, bool transposed, int64_t start, int64_t stop) {
  run_all(map, state, transposed, start, stop);
}
#endif

}  // namespace

void run_cpu(const LinearMap& map, Scalar state, bool transposed, int64_t start, int64_t stop) {
#if defined(__x86_64__)
  static const bool has_fma = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (has_fma) return run_fma(map, state, transposed, start, stop);
#endif
  run_all(map, state, transposed, start, stop);
}

}  // namespace prfl::solver_step
