// The backends of a LinearMap.
#pragma once

#include "ops/solver_step/linear_map.h"

namespace prfl::solver_step {

// Elements start .. stop - 1.
void run_cpu(const LinearMap& map, Scalar state, bool transposed, int64_t start, int64_t stop);

// All elements, on the device that is current, in the given stream (a cudaStream_t). Throws when the launch fails.
void launch_cuda(const LinearMap& map, Scalar state, bool transposed, void* stream);

}  // namespace prfl::solver_step
