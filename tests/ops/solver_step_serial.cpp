// The CUDA source of the solver step, compiled by a C++ compiler and run thread after thread in place of the CPU code.
// Enough for kernels whose threads never meet: no barrier, no shuffle, no shared memory.
#include <cmath>
#include <cstdint>

struct Index {
  unsigned x;
};
static thread_local Index blockIdx, threadIdx;

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(n)
static inline float __fadd_rn(float a, float b) { return a + b; }
static inline double __dadd_rn(double a, double b) { return a + b; }
static inline float __fmul_rn(float a, float b) { return a * b; }
static inline double __dmul_rn(double a, double b) { return a * b; }
using std::fma;

#include "ops/solver_step/kernel.cuh"
#include "ops/solver_step/launch.h"

namespace prfl::solver_step {
namespace {

template <typename T, int kRows, bool kTransposed>
void run_kernel(const LinearMap& map) {
  const int64_t blocks = (map.length + kThreads * kVector - 1) / (kThreads * kVector);
  for (int64_t block = 0; block < blocks; ++block) {
    for (unsigned thread = 0; thread < kThreads; ++thread) {
      blockIdx.x = static_cast<unsigned>(block);
      threadIdx.x = thread;
      solver_step_kernel<T, kRows, kTransposed>(map);
    }
  }
}

// As cuda.cu chooses.
template <bool kTransposed>
void run_rows(const LinearMap& map, Scalar state) {
  if (state == Scalar::f64) {
    if (map.rows <= 4) return run_kernel<double, 4, kTransposed>(map);
    return run_kernel<double, kMaxTerms, kTransposed>(map);
  }
  if (map.rows <= 2) return run_kernel<float, 2, kTransposed>(map);
  if (map.rows <= 4) return run_kernel<float, 4, kTransposed>(map);
  return run_kernel<float, kMaxTerms, kTransposed>(map);
}

}  // namespace

// register.cpp hands out ranges of elements; whoever has the first runs the whole launch.
void run_cpu(const LinearMap& map, Scalar state, bool transposed, int64_t start, int64_t) {
  if (start == 0) transposed ? run_rows<true>(map, state) : run_rows<false>(map, state);
}

}  // namespace prfl::solver_step
