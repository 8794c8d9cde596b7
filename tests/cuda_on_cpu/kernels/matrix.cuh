// Tensor-core kernels, right and wrong ones.
#pragma once

#include "common/async_copy.cuh"
#include "common/matrix.cuh"
#include "common/memory.cuh"

namespace kernels {

enum class Defect { none, no_wait, early_read, no_syncwarp, no_syncwarp_after, half_a_warp };

// One warp: c [16][16] = a [16][k] times b, which is [16][k] by columns, or [k][16] with kByRows. k: a multiple of 16. The
// next 16 of k are on their way while these are multiplied.
template <typename E, bool kByRows, Defect kDefect = Defect::none>
__global__ void matrix_product(const E* a, const E* b, float* c, int k) {
  struct Stage {
    E a[16][24];  // 8 elements of padding: rows start in different banks
    E b[16][24];
  };
  struct alignas(16) Storage {
    Stage stage[2];
  };
  Storage& shared = prfl::block_shared<Storage>();
  const int lane = threadIdx.x, row = lane / 2, column = 8 * (lane % 2);
  const auto fetch = [&](Stage& to, int at) {
    prfl::copy_async(&to.a[row][column], a + row * k + at + column);
    prfl::copy_async(&to.b[row][column], kByRows ? b + (at + row) * 16 + column : b + row * k + at + column);
  };
  float sum[2][4] = {};
  fetch(shared.stage[0], 0);
  prfl::copy_async_commit();
  for (int at = 0; at < k; at += 16) {
    Stage& now = shared.stage[at / 16 % 2];
    if (at + 16 < k) fetch(shared.stage[(at / 16 + 1) % 2], at + 16);
    prfl::copy_async_commit();
    if (kDefect == Defect::early_read) {
      prfl::copy_async_wait<2>();
    } else if (kDefect != Defect::no_wait) {
      prfl::copy_async_wait<1>();
    }
    if (kDefect != Defect::no_syncwarp) __syncwarp();
    if (kDefect == Defect::half_a_warp && lane >= 16) continue;
    uint32_t of_a[4], of_b[4];
    prfl::load_matrices<false>(of_a, &now.a[lane % 16][8 * (lane / 16)]);
    const int first = lane % 8 + 8 * (kByRows ? lane / 8 % 2 : lane / 16), second = kByRows ? lane / 16 : lane / 8 % 2;
    prfl::load_matrices<kByRows>(of_b, &now.b[first][8 * second]);
    for (int i = 0; i < 2; ++i) prfl::multiply_add<E>(sum[i], of_a, of_b[2 * i], of_b[2 * i + 1]);
    if (kDefect != Defect::no_syncwarp_after) __syncwarp();
  }
  for (int i = 0; i < 8; ++i) {
    const int to_row = lane / 4 + 8 * (i / 2 % 2), to_column = 2 * (lane % 4) + i % 2 + 8 * (i / 4);
    prfl::global_store(c + to_row * 16 + to_column, sum[i / 4][i % 4]);
  }
}

// to[i] = from[i] where i < length, else 0, by copies that are cut short.
__global__ void short_copies(const float* from, float* to, int length) {
  struct alignas(16) Storage {
    float value[32][4];
  };
  Storage& shared = prfl::block_shared<Storage>();
  const int first = 4 * threadIdx.x, left = length - first;
  const int bytes = left >= 4 ? 16 : left > 0 ? 4 * left : 0;
  prfl::copy_async(shared.value[threadIdx.x], from + first, bytes);
  prfl::copy_async_commit();
  prfl::copy_async_wait<0>();
  for (int i = 0; i < 4; ++i) prfl::global_store(to + first + i, prfl::shared_load(&shared.value[threadIdx.x][i]));
}

}  // namespace kernels
