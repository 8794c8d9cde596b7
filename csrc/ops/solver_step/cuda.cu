// Launch of the solver step's kernel.
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "ops/solver_step/kernel.cuh"
#include "ops/solver_step/launch.h"

namespace prfl::solver_step {
namespace {

template <typename T, int kRows, bool kTransposed>
void launch_kernel(const LinearMap& map, cudaStream_t stream) {
  const int64_t per_block = static_cast<int64_t>(kThreads) * kVector;
  const auto blocks = static_cast<unsigned>((map.length + per_block - 1) / per_block);
  solver_step_kernel<T, kRows, kTransposed><<<blocks, kThreads, 0, stream>>>(map);
}

// Few variants: rows that are not there cost registers, each further kernel costs build time for every architecture.
template <bool kTransposed>
void launch_rows(const LinearMap& map, Scalar state, cudaStream_t stream) {
  if (state == Scalar::f64) {
    if (map.rows <= 4) return launch_kernel<double, 4, kTransposed>(map, stream);
    return launch_kernel<double, kMaxTerms, kTransposed>(map, stream);
  }
  if (map.rows <= 2) return launch_kernel<float, 2, kTransposed>(map, stream);
  if (map.rows <= 4) return launch_kernel<float, 4, kTransposed>(map, stream);
  return launch_kernel<float, kMaxTerms, kTransposed>(map, stream);
}

}  // namespace

void launch_cuda(const LinearMap& map, Scalar state, bool transposed, void* stream_handle) {
  const auto stream = static_cast<cudaStream_t>(stream_handle);
  transposed ? launch_rows<true>(map, state, stream) : launch_rows<false>(map, state, stream);
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string("solver_step: the launch failed: ") + cudaGetErrorString(error));
  }
}

}  // namespace prfl::solver_step
