// Small kernels that are right; nvcc compiles them as they stand.
#pragma once

#include <cstdint>

#include "common/memory.cuh"

namespace kernels {

using prfl::block_shared;
using prfl::dynamic_shared;
using prfl::global_load;
using prfl::global_store;
using prfl::shared_load;
using prfl::shared_store;

constexpr int kThreads = 128;

// to[block] = sum of the block's kThreads elements, by halves.
__global__ void block_sum(const float* from, float* to, int length) {
  struct Storage {
    float part[kThreads];
  };
  Storage& shared = block_shared<Storage>();
  const int i = blockIdx.x * kThreads + threadIdx.x;
  shared_store(&shared.part[threadIdx.x], i < length ? global_load(from + i) : 0.0f);
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) {
      const float sum = shared_load(&shared.part[threadIdx.x]) + shared_load(&shared.part[threadIdx.x + half]);
      shared_store(&shared.part[threadIdx.x], sum);
    }
  }
  if (threadIdx.x == 0) global_store(to + blockIdx.x, shared_load(&shared.part[0]));
}

// Sums over groups of `width` lanes, three ways: by xor, down, and up; each thread stores what it has.
__global__ void warp_sums(const double* from, double* by_xor, double* by_down, double* by_up, int width) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  const double value = global_load(from + i);
  double x = value, d = value, u = value;
  for (int step = 1; step < width; step *= 2) {
    x += __shfl_xor_sync(0xFFFFFFFFu, x, step, width);
    d += __shfl_down_sync(0xFFFFFFFFu, d, step, width);
    const double before = __shfl_up_sync(0xFFFFFFFFu, u, step, width);
    if (static_cast<int>(threadIdx.x) % width >= step) u += before;  // an inclusive prefix sum
  }
  global_store(by_xor + i, x);
  global_store(by_down + i, __shfl_sync(0xFFFFFFFFu, d, 0, width));
  global_store(by_up + i, u);
}

// to[column][row] = from[row][column], through tiles of 32 x 32; blocks of 32 x 8.
__global__ void transposition(const float* from, float* to, int rows, int columns) {
  struct Storage {
    float tile[32][33];
  };
  Storage& shared = block_shared<Storage>();
  int column = blockIdx.x * 32 + threadIdx.x;
  for (int j = threadIdx.y; j < 32; j += 8) {
    const int row = blockIdx.y * 32 + j;
    if (row < rows && column < columns) {
      shared_store(&shared.tile[j][threadIdx.x], global_load(from + static_cast<int64_t>(row) * columns + column));
    }
  }
  __syncthreads();
  const int row = blockIdx.y * 32 + threadIdx.x;
  for (int j = threadIdx.y; j < 32; j += 8) {
    column = blockIdx.x * 32 + j;
    if (row < rows && column < columns) {
      global_store(to + static_cast<int64_t>(column) * rows + row, shared_load(&shared.tile[threadIdx.x][j]));
    }
  }
}

// One row a block: to = from / sqrt(mean of squares + eps). Channels: a multiple of 4, rows aligned to 16 bytes.
__global__ void row_norm(const float* from, float* to, int channels, float eps) {
  struct Storage {
    float part[32];
  };
  Storage& shared = block_shared<Storage>();
  const float4* row = reinterpret_cast<const float4*>(from + static_cast<int64_t>(blockIdx.x) * channels);
  float4* out = reinterpret_cast<float4*>(to + static_cast<int64_t>(blockIdx.x) * channels);
  float sum = 0.0f;
  for (int i = threadIdx.x; i < channels / 4; i += blockDim.x) {
    const float4 v = global_load(row + i);
    sum += v.x * v.x + v.y * v.y + v.z * v.z + v.w * v.w;
  }
  for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(0xFFFFFFFFu, sum, step);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  if (lane == 0) shared_store(&shared.part[warp], sum);
  __syncthreads();
  sum = lane < warps ? shared_load(&shared.part[lane]) : 0.0f;
  for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(0xFFFFFFFFu, sum, step);
  const float scale = rsqrtf(sum / channels + eps);
  for (int i = threadIdx.x; i < channels / 4; i += blockDim.x) {
    const float4 v = global_load(row + i);
    global_store(out + i, make_float4(v.x * scale, v.y * scale, v.z * scale, v.w * scale));
  }
}

// counts[value] for values below 16: in shared memory first, then in global memory.
__global__ void histogram(const int* values, unsigned* counts, int length) {
  struct Storage {
    unsigned count[16];
  };
  Storage& shared = block_shared<Storage>();
  if (threadIdx.x < 16) shared_store(&shared.count[threadIdx.x], 0u);
  __syncthreads();
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < length) atomicAdd(&shared.count[global_load(values + i)], 1u);
  __syncthreads();
  if (threadIdx.x < 16) atomicAdd(counts + threadIdx.x, shared_load(&shared.count[threadIdx.x]));
}

// The two halves of a warp each turn their own 16 values round, twice, without waiting for the other half.
__global__ void half_warps(const int* from, int* to) {
  struct Storage {
    int value[32];
  };
  Storage& shared = block_shared<Storage>();
  const unsigned lane = threadIdx.x, half = lane / 16;
  const unsigned mask = 0xFFFFu << 16 * half;
  int value = global_load(from + lane);
  for (unsigned turn = 0; turn < 2 + half; ++turn) {
    shared_store(&shared.value[lane], value);
    __syncwarp(mask);
    value = shared_load(&shared.value[lane ^ 15]) + 1;
    __syncwarp(mask);
  }
  global_store(to + lane, value);
}

// A word that the halves of a warp read at different times; then all wait, and it is written again.
__global__ void word_of_two_halves(const int* from, int* to) {
  struct Storage {
    int word;
  };
  Storage& shared = block_shared<Storage>();
  if (threadIdx.x == 0) shared_store(&shared.word, global_load(from));
  __syncwarp();
  if (threadIdx.x >= 16) __syncwarp(0xFFFF0000u);
  const int first = shared_load(&shared.word);
  __syncwarp();
  if (threadIdx.x == 20) shared_store(&shared.word, first + 1);
  __syncwarp();
  global_store(to + threadIdx.x, shared_load(&shared.word));
}

// Inclusive prefix sum of one block in dynamic shared memory: two rows that take turns.
__global__ void prefix_sum(const int* from, int* to) {
  int* const rows = reinterpret_cast<int*>(dynamic_shared());
  const int n = blockDim.x, i = threadIdx.x;
  shared_store(rows + i, global_load(from + i));
  int now = 0;
  for (int step = 1; step < n; step *= 2) {
    __syncthreads();
    int sum = shared_load(rows + now * n + i);
    if (i >= step) sum += shared_load(rows + now * n + i - step);
    now ^= 1;
    shared_store(rows + now * n + i, sum);
  }
  global_store(to + i, shared_load(rows + now * n + i));
}

// Each thread of a three-dimensional grid of three-dimensional blocks stores its number.
__global__ void numbers(unsigned* to) {
  const unsigned block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  const unsigned thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  const unsigned number = block * (blockDim.x * blockDim.y * blockDim.z) + thread;
  global_store(to + number, number);
}

// Bit 0: any; bit 1: all; the rest: how many, of the lanes that are still there, have an odd value.
__global__ void votes(const int* from, int* to, int length) {
  const int i = threadIdx.x;
  if (i >= length) return;
  const int odd = global_load(from + i) & 1;
  const unsigned ballot = __ballot_sync(0xFFFFFFFFu, odd);
  const int any = __any_sync(0xFFFFFFFFu, odd) ? 1 : 0, all = __all_sync(0xFFFFFFFFu, odd) ? 2 : 0;
  global_store(to + i, any | all | __popc(ballot) << 2);
}

// Each thread stores one int to a row of 32.
__global__ void strided(int* to) { global_store(to + 32 * threadIdx.x, static_cast<int>(threadIdx.x)); }

// Vectors of 32 bytes, which no single instruction moves.
struct alignas(16) Wide {
  double value[4];
};
__global__ void wide(const Wide* from, double* to) {
  const Wide value = global_load(from + threadIdx.x);
  global_store(to + threadIdx.x, (value.value[0] + value.value[1]) + (value.value[2] + value.value[3]));
}

}  // namespace kernels
