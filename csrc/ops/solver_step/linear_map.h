// What one solver step, or its transpose, computes: plain data that the host fills in and every backend reads.
#pragma once

#include <cstdint>

#include "common/scalar.h"

namespace prfl::solver_step {

// Terms of the step are the state, the network's output and the noise. More than this is the reference's business.
constexpr int kMaxTerms = 16;
constexpr int kMaxMaskDims = 4;

struct Source {
  const void* data;  // null: absent
  Scalar scalar;
};

struct Target {
  void* data;  // null: absent
  Scalar scalar;
};

// True where the step changes x. One byte an element; strides in elements, 0 where the mask is broadcast.
struct Mask {
  const uint8_t* data;  // null: absent
  int dims;
  int64_t size[kMaxMaskDims];
  int64_t stride[kMaxMaskDims];
};

// row[r] = sum over t of coefficient[t][r] * term[t], in double, rounded once. With T the dtype of the state:
//
// The step.          term[guided] is u + guidance * (c - u), when u, `second`, is there; c is the term itself. Both are
//                    cast to `guidance_scalar` first, and every operation is rounded to it, as torch's own are.
//                    With a mask row[0] is term[0] where the mask is false. `extra` is row[0] in another dtype.
// The transpose.     term[0] has T(second) added, when it is there; with a mask it counts as zero where the mask is
//                    false, and is added to row[0] there. With `extra`, the unconditional output's gradient, row[guided]
//                    is rounded to T and to `guidance_scalar`, g: it holds g * guidance and `extra` the rest,
//                    g - g * guidance, each rounded to `guidance_scalar`, as autograd has them.
struct LinearMap {
  int64_t length;
  int terms;
  int rows;
  int guided;  // -1: none
  // Leading terms of the state's dtype whose data is aligned to 16 bytes and which are not guided: read several at a
  // time, without a look at each one's dtype. See count_plain.
  int plain;
  double guidance;
  Scalar guidance_scalar;  // double for a state of doubles only
  Source term[kMaxTerms];
  Source second;
  Target row[kMaxTerms];
  Target extra;
  Mask mask;
  double coefficient[kMaxTerms][kMaxTerms];
};

inline int count_plain(const LinearMap& map, Scalar state, bool transposed) {
  int plain = 0;
  while (plain < map.terms && map.term[plain].scalar == state && (transposed || plain != map.guided) &&
         reinterpret_cast<uintptr_t>(map.term[plain].data) % 16 == 0) {
    ++plain;
  }
  return plain;
}

// Whether guidance is arithmetic in T, the state's dtype; else it is in float, rounded to what is narrower, as torch does.
template <typename T>
PRFL_INLINE bool guides_in(const LinearMap& map) {
  return sizeof(T) == sizeof(float) || map.guidance_scalar == Scalar::f64;
}

// Where in the mask the byte stands that belongs to element `index` in logical order.
PRFL_INLINE int64_t mask_offset(const Mask& mask, int64_t index) {
  int64_t offset = 0;
#pragma unroll
  for (int d = kMaxMaskDims - 1; d >= 0; --d) {
    if (d < mask.dims) {
      const int64_t next = d == 0 ? 0 : index / mask.size[d];
      offset += (index - next * mask.size[d]) * mask.stride[d];
      index = next;
    }
  }
  return offset;
}

}  // namespace prfl::solver_step
