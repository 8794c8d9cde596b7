// The ways in which a kernel reaches memory that threads share. On a GPU they are the plain accesses; tests/cuda_on_cpu
// has its own, which check each one, so kernels use nothing else.
#pragma once

#ifndef PRFL_CUDA_ON_CPU

namespace prfl {

template <typename V>
__device__ __forceinline__ V global_load(const V* from) {
  return *from;
}

template <typename V>
__device__ __forceinline__ void global_store(V* to, const V& value) {
  *to = value;
}

template <typename V>
__device__ __forceinline__ V shared_load(const V* from) {
  return *from;
}

template <typename V>
__device__ __forceinline__ void shared_store(V* to, const V& value) {
  *to = value;
}

// One S per block, uninitialised; S is plain data. Its address is for the accessors above.
template <typename S>
__device__ __forceinline__ S& block_shared() {
  __shared__ S storage;
  return storage;
}

// The bytes that the launch asks for, aligned to 128.
__device__ __forceinline__ unsigned char* dynamic_shared() {
  extern __shared__ __align__(128) unsigned char prfl_dynamic_shared[];
  return prfl_dynamic_shared;
}

}  // namespace prfl

#endif
