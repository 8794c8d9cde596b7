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

template <typename T, bool kTransposed>
void launch_rows(const LinearMap& map, cudaStream_t stream) {
  if (map.rows <= 1) return launch_kernel<T, 1, kTransposed>(map, stream);
  if (map.rows <= 2) return launch_kernel<T, 2, kTransposed>(map, stream);
  if (map.rows <= 4) return launch_kernel<T, 4, kTransposed>(map, stream);
  if (map.rows <= 8) return launch_kernel<T, 8, kTransposed>(map, stream);
  return launch_kernel<T, kMaxTerms, kTransposed>(map, stream);
}

}  // namespace

void launch_cuda(const LinearMap& map, Scalar state, bool transposed, void* stream_handle) {
  const auto stream = static_cast<cudaStream_t>(stream_handle);
  if (state == Scalar::f64) {
    transposed ? launch_rows<double, true>(map, stream) : launch_rows<double, false>(map, stream);
  } else {
    transposed ? launch_rows<float, true>(map, stream) : launch_rows<float, false>(map, stream);
  }
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string("solver_step: the launch failed: ") + cudaGetErrorString(error));
  }
}

}  // namespace prfl::solver_step
