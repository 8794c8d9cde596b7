// Launch of the solver step's kernel.
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "ops/solver_step/launch.h"
#include "ops/solver_step/variants.cuh"

namespace prfl::solver_step {
namespace {

struct Launcher {
  cudaStream_t stream;

  template <typename T, int kRows, bool kTransposed>
  void launch(const LinearMap& map, unsigned blocks) const {
    solver_step_kernel<T, kRows, kTransposed><<<blocks, kThreads, 0, stream>>>(map);
  }
};

}  // namespace

void launch_cuda(const LinearMap& map, Scalar state, bool transposed, void* stream_handle) {
  const Launcher launcher{static_cast<cudaStream_t>(stream_handle)};
  transposed ? launch_rows<true>(map, state, launcher) : launch_rows<false>(map, state, launcher);
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string("solver_step: the launch failed: ") + cudaGetErrorString(error));
  }
}

}  // namespace prfl::solver_step
