// Which kernel serves a map, and with how many blocks: the same choice on a GPU and in the CPU runner of the tests.
#pragma once

#include "ops/solver_step/kernel.cuh"

namespace prfl::solver_step {

// Calls launcher.launch<T, kRows, kTransposed>(map, blocks). Few variants: rows that are not there cost registers, each
// further kernel costs build time for every architecture.
template <bool kTransposed, typename Launcher>
void launch_rows(const LinearMap& map, Scalar state, Launcher launcher) {
  const int64_t per_block = static_cast<int64_t>(kThreads) * kVector;
  const auto blocks = static_cast<unsigned>((map.length + per_block - 1) / per_block);
  if (state == Scalar::f64) {
    if (map.rows <= 4) return launcher.template launch<double, 4, kTransposed>(map, blocks);
    return launcher.template launch<double, kMaxTerms, kTransposed>(map, blocks);
  }
  if (map.rows <= 2) return launcher.template launch<float, 2, kTransposed>(map, blocks);
  if (map.rows <= 4) return launcher.template launch<float, 4, kTransposed>(map, blocks);
  return launcher.template launch<float, kMaxTerms, kTransposed>(map, blocks);
}

}  // namespace prfl::solver_step
