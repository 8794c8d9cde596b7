// ldmatrix and mma.sync as csrc/common/matrix.cuh has them, from the fragment layouts of the PTX manual.
#pragma once

#include <array>
#include <cstdint>
#include <cstring>

#include "access.h"
#include "common/scalar.h"

namespace cuda_on_cpu {

// Lane `lane`'s slots of a meeting that all 32 have reached.
template <typename Slot, typename Do>
void for_all_lanes(Meeting& meeting, Do act) {
  if (meeting.arrived != ~0u) {
    throw Error(std::string(meeting.what) + " at " + meeting.site.text() + ": all lanes have to take part, only " +
                ranges(meeting.arrived) + " do");
  }
  for (unsigned lane = 0; lane < 32; ++lane) act(lane, *static_cast<Slot*>(meeting.slot[lane]));
}

struct MatrixRow {
  std::array<uint16_t, 8> element;
  std::array<uint32_t, 4> result;
};

template <bool kTransposed>
void exchange_rows(Meeting& meeting) {
  uint16_t matrix[4][8][8];
  for_all_lanes<MatrixRow>(meeting, [&](unsigned lane, MatrixRow& row) {
    std::memcpy(matrix[lane / 8][lane % 8], row.element.data(), 16);
  });
  for_all_lanes<MatrixRow>(meeting, [&](unsigned lane, MatrixRow& row) {
    const unsigned g = lane / 4, t = lane % 4;
    for (unsigned j = 0; j < 4; ++j) {
      const uint32_t low = kTransposed ? matrix[j][2 * t][g] : matrix[j][g][2 * t];
      const uint32_t high = kTransposed ? matrix[j][2 * t + 1][g] : matrix[j][g][2 * t + 1];
      row.result[j] = high << 16 | low;
    }
  });
}

struct Fragments {
  float (&d)[4];
  const uint32_t (&a)[4];
  uint32_t b[2];
};

// Sums in double, rounded once: a tensor core rounds more often, and in an order of its own.
template <typename E>
void multiply_fragments(Meeting& meeting) {
  const auto element = [](uint32_t pair, unsigned i) {
    return static_cast<double>(prfl::widen(E{static_cast<uint16_t>(pair >> 16 * i)}));
  };
  double a[16][16], b[16][8];
  for_all_lanes<Fragments>(meeting, [&](unsigned lane, Fragments& mine) {
    const unsigned g = lane / 4, t = lane % 4;
    for (unsigned i = 0; i < 2; ++i) {
      for (unsigned j = 0; j < 4; ++j) a[g + 8 * (j % 2)][2 * t + i + 8 * (j / 2)] = element(mine.a[j], i);
      for (unsigned j = 0; j < 2; ++j) b[2 * t + i + 8 * j][g] = element(mine.b[j], i);
    }
  });
  for_all_lanes<Fragments>(meeting, [&](unsigned lane, Fragments& mine) {
    const unsigned g = lane / 4, t = lane % 4;
    for (unsigned i = 0; i < 4; ++i) {
      double sum = mine.d[i];
      for (unsigned k = 0; k < 16; ++k) sum += a[g + 8 * (i / 2)][k] * b[k][2 * t + i % 2];
      mine.d[i] = static_cast<float>(sum);
    }
  });
}

}  // namespace cuda_on_cpu

namespace prfl {

template <bool kTransposed>
void load_matrices(uint32_t (&to)[4], const void* row, cuda_on_cpu::Site site = cuda_on_cpu::Site::here()) {
  using namespace cuda_on_cpu;
  MatrixRow mine{};
  load(Space::shared, mine.element.data(), row, 16, 16, site);
  Block::running->meet("load_matrices", ~0u, &mine, exchange_rows<kTransposed>, site);
  std::memcpy(to, mine.result.data(), sizeof(to));
}

template <typename E>
void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                  cuda_on_cpu::Site site = cuda_on_cpu::Site::here()) {
  cuda_on_cpu::Fragments mine{d, a, {b0, b1}};
  cuda_on_cpu::Block::running->meet("multiply_add", ~0u, &mine, cuda_on_cpu::multiply_fragments<E>, site);
}

}  // namespace prfl
