// Copies from global to shared memory that run while the thread goes on: cp.async, sm_80 and later.
#pragma once

#include <cstdint>

#ifndef PRFL_CUDA_ON_CPU

namespace prfl {

// 16 bytes, both addresses aligned to 16. The first `bytes` of them are read, 0 to 16; the rest becomes zeros.
__device__ __forceinline__ void copy_async(void* to_shared, const void* from_global, int bytes = 16) {
  const auto to = static_cast<uint32_t>(__cvta_generic_to_shared(to_shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from_global), "r"(bytes) : "memory");
}

// The thread's copies since the last call are a group.
__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Until at most the latest kPending groups of the thread are under way. Other threads see the rest after a barrier.
template <int kPending>
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

}  // namespace prfl

#endif
