// kernel<<<grid, block, shared>>>(...) on the CPU: launch(where, [&] { kernel(...); });
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <numeric>
#include <string>
#include <vector>

#include "block.h"
#include "qualifiers.h"

namespace cuda_on_cpu {

constexpr size_t kSharedLimit = 227 << 10;  // of a block, on sm_90

struct Launch {
  dim3 grid;
  dim3 block;
  size_t dynamic_shared = 0;  // bytes
  uint64_t seed = 0;          // 0: all in order; 1: in reverse; others: shuffled
};

// Runs the blocks one after the other and gives the traffic of all. Throws Error for what a GPU would get wrong.
inline Counters launch(const Launch& where, const std::function<void()>& kernel) {
  const auto count = [](dim3 size) { return static_cast<uint64_t>(size.x) * size.y * size.z; };
  if (count(where.block) < 1 || count(where.block) > 1024 || where.block.z > 64) {
    throw Error("launch: expected 1 to 1024 threads, at most 64 of them in z, got " +
                text({where.block.x, where.block.y, where.block.z}));
  }
  if (count(where.grid) < 1 || where.grid.x > 0x7FFFFFFFu || where.grid.y > 65535 || where.grid.z > 65535) {
    throw Error("launch: expected at least 1 block, at most 65535 in y and z, got " +
                text({where.grid.x, where.grid.y, where.grid.z}));
  }
  std::vector<uint64_t> order(count(where.grid));
  std::iota(order.begin(), order.end(), 0);
  if (where.seed == 1) std::reverse(order.begin(), order.end());
  if (where.seed > 1) {
    Random random(where.seed);
    for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[random.below(i)]);
  }
  if (where.dynamic_shared > kSharedLimit) {
    throw Error("launch: expected at most " + std::to_string(kSharedLimit) + " bytes of dynamic shared memory, got " +
                std::to_string(where.dynamic_shared));
  }
  Block block({where.grid.x, where.grid.y, where.grid.z}, {where.block.x, where.block.y, where.block.z},
              where.dynamic_shared, where.seed);
  const struct Running {
    explicit Running(Block* block) { Block::running = block; }
    ~Running() { Block::running = nullptr; }
  } running(&block);
  const Fiber::Faults faults;
  for (uint64_t i : order) {
    block.run({static_cast<unsigned>(i % where.grid.x), static_cast<unsigned>(i / where.grid.x % where.grid.y),
               static_cast<unsigned>(i / where.grid.x / where.grid.y)},
              kernel);
  }
  return block.counters;
}

}  // namespace cuda_on_cpu
