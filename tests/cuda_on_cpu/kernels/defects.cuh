// Kernels with one defect each, which the runner has to find whatever the order of threads.
#pragma once

#include "kernels/correct.cuh"

namespace kernels {

struct Words {
  float word[64];
};

__global__ void no_syncthreads(const float* from, float* to) {
  Words& shared = block_shared<Words>();
  shared_store(&shared.word[threadIdx.x], global_load(from + threadIdx.x));
  global_store(to + threadIdx.x, shared_load(&shared.word[63 - threadIdx.x]));
}

__global__ void no_syncwarp(const float* from, float* to) {
  Words& shared = block_shared<Words>();
  shared_store(&shared.word[threadIdx.x], global_load(from + threadIdx.x));
  global_store(to + threadIdx.x, shared_load(&shared.word[threadIdx.x ^ 1]));
}

// A shuffle makes lanes wait for each other but orders no memory accesses.
__global__ void shuffle_for_syncwarp(const float* from, float* to) {
  Words& shared = block_shared<Words>();
  shared_store(&shared.word[threadIdx.x], global_load(from + threadIdx.x));
  const float one = __shfl_sync(0xFFFFFFFFu, 1.0f, 0);
  global_store(to + threadIdx.x, one * shared_load(&shared.word[threadIdx.x ^ 1]));
}

// Half a warp waits for itself, then reads what the other half wrote.
__global__ void syncwarp_of_half(const float* from, float* to) {
  Words& shared = block_shared<Words>();
  shared_store(&shared.word[threadIdx.x], global_load(from + threadIdx.x));
  __syncwarp(threadIdx.x < 16 ? 0xFFFFu : 0xFFFF0000u);
  global_store(to + threadIdx.x, shared_load(&shared.word[threadIdx.x ^ 16]));
}

// As word_of_two_halves, but one half alone is waited for.
__global__ void one_half_waited_for(const float* from, float* to) {
  Words& shared = block_shared<Words>();
  if (threadIdx.x == 0) shared_store(&shared.word[0], global_load(from));
  __syncwarp();
  if (threadIdx.x >= 16) __syncwarp(0xFFFF0000u);
  global_store(to + threadIdx.x, shared_load(&shared.word[0]));
  if (threadIdx.x >= 16) __syncwarp(0xFFFF0000u);
  if (threadIdx.x == 20) shared_store(&shared.word[0], 1.0f);
}

// __syncwarp where threads of two warps meet.
__global__ void syncwarp_for_syncthreads(const float* from, float* to) {
  Words& shared = block_shared<Words>();
  shared_store(&shared.word[threadIdx.x], global_load(from + threadIdx.x));
  __syncwarp();
  global_store(to + threadIdx.x, shared_load(&shared.word[63 - threadIdx.x]));
}

// Read by all, then written by one, with nothing in between.
__global__ void write_after_read(const float* from, float* to) {
  Words& shared = block_shared<Words>();
  if (threadIdx.x == 0) shared_store(&shared.word[0], global_load(from));
  __syncthreads();
  const float first = shared_load(&shared.word[0]);
  if (threadIdx.x == 7) shared_store(&shared.word[0], 0.0f);
  global_store(to + threadIdx.x, first);
}

__global__ void branch_around_barrier(const float* from, float* to) {
  if (threadIdx.x < 40) __syncthreads();
  global_store(to + threadIdx.x, global_load(from + threadIdx.x));
}

__global__ void barrier_in_both_branches(const float* from, float* to) {
  if (threadIdx.x < 40) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  global_store(to + threadIdx.x, global_load(from + threadIdx.x));
}

__global__ void syncwarp_in_branch(const float* from, float* to) {
  if (threadIdx.x < 8) __syncwarp();
  __syncthreads();
  global_store(to + threadIdx.x, global_load(from + threadIdx.x));
}

__global__ void reads_one_too_far(const float* from, float* to) {
  global_store(to + threadIdx.x, global_load(from + threadIdx.x + 1));
}

__global__ void reads_one_too_early(const float* from, float* to) {
  global_store(to + threadIdx.x, global_load(from + static_cast<int>(threadIdx.x) - 1));
}

__global__ void writes_one_too_far(const float* from, float* to) {
  global_store(to + threadIdx.x + 1, global_load(from + threadIdx.x));
}

__global__ void shared_out_of_bounds(const float* from, float* to) {
  Words& shared = block_shared<Words>();
  const float* words = shared.word;
  shared_store(&shared.word[threadIdx.x], global_load(from + threadIdx.x));
  __syncthreads();
  global_store(to + threadIdx.x, shared_load(words + threadIdx.x + 1));
}

__global__ void uninitialised(const float* from, float* to) {
  Words& shared = block_shared<Words>();
  if (threadIdx.x != 5) shared_store(&shared.word[threadIdx.x], global_load(from + threadIdx.x));
  __syncthreads();
  global_store(to + threadIdx.x, shared_load(&shared.word[threadIdx.x]));
}

// What the block before left in shared memory is not there any more.
__global__ void left_by_another_block(const float* from, float* to) {
  Words& shared = block_shared<Words>();
  if (blockIdx.x == 0) shared_store(&shared.word[threadIdx.x], global_load(from + threadIdx.x));
  __syncthreads();
  global_store(to + blockIdx.x * blockDim.x + threadIdx.x, shared_load(&shared.word[threadIdx.x]));
}

__global__ void misaligned(const float* from, float* to) {
  const float4 value = global_load(reinterpret_cast<const float4*>(from + 1));
  global_store(to + threadIdx.x, value.x);
}

__global__ void blocks_write_one_place(const float* from, float* to) {
  global_store(to + threadIdx.x, global_load(from + threadIdx.x) + blockIdx.x);
}

// One block reads what another one writes.
__global__ void blocks_read_and_write(const float* from, float* to) {
  if (blockIdx.x == 0) global_store(to + threadIdx.x, global_load(from + threadIdx.x));
  if (blockIdx.x == 1) global_store(to + blockDim.x + threadIdx.x, global_load(to + threadIdx.x));
}

__global__ void atomic_and_plain(const float*, float* to) {
  if (threadIdx.x == 0) global_store(to, 0.0f);
  if (threadIdx.x == 33) atomicAdd(to, 1.0f);
}

__global__ void shuffle_from_inactive(const float* from, float* to) {
  float value = global_load(from + threadIdx.x);
  if (threadIdx.x < 16) value += __shfl_down_sync(0xFFFFu, value, 8);
  global_store(to + threadIdx.x, value);
}

__global__ void shuffle_from_exited(const float* from, float* to) {
  if (threadIdx.x >= 24) return;
  const float value = global_load(from + threadIdx.x);
  global_store(to + threadIdx.x, value + __shfl_xor_sync(0xFFFFFFFFu, value, 16));
}

__global__ void shuffle_in_branch(const float* from, float* to) {
  float value = global_load(from + threadIdx.x);
  if (threadIdx.x < 16) value += __shfl_xor_sync(0xFFFFFFFFu, value, 1);
  __syncthreads();
  global_store(to + threadIdx.x, value);
}

__global__ void mask_without_itself(const float* from, float* to) {
  const float value = global_load(from + threadIdx.x);
  global_store(to + threadIdx.x, __shfl_xor_sync(0xFFFF0000u, value, 1));
}

__global__ void plain_access(const float* from, float* to) { global_store(to + threadIdx.x, from[threadIdx.x]); }

__global__ void wrong_space(const float* from, float* to) { global_store(to + threadIdx.x, shared_load(from)); }

__global__ void no_dynamic_shared(const float*, float* to) {
  global_store(to, shared_load(reinterpret_cast<const float*>(dynamic_shared())));
}

__device__ __attribute__((noinline)) int endless(int depth) { return depth < 0 ? 0 : 1 + endless(depth + 1) * 2; }

__global__ void recursion_without_end(const float*, float* to) {
  global_store(to + threadIdx.x, static_cast<float>(endless(static_cast<int>(threadIdx.x))));
}

}  // namespace kernels
