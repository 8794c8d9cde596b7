// cp.async as csrc/common/async_copy.cuh has it: the bytes arrive when their group is waited for, poison stands there
// before. Issue and arrival both count as writes of the thread.
#pragma once

#include <array>
#include <cstring>

#include "access.h"

namespace cuda_on_cpu {

__attribute__((noinline)) inline void issue_copy(void* to, const void* from, int bytes, Site site) {
  if (bytes < 0 || bytes > 16 || reinterpret_cast<uintptr_t>(from) % 16 != 0) {
    throw Error("copy_async of " + std::to_string(bytes) + " bytes by " + Block::running->who() + " at " + site.text() +
                ": expected 0 to 16 bytes, from an address that is a multiple of 16");
  }
  AsyncCopy copy{to, {}, site};
  std::memset(touch(Space::shared, Kind::write, to, 16, 16, site), kPoison, 16);
  if (bytes > 0) {
    std::memcpy(copy.bytes.data(), touch(Space::global, Kind::read, from, bytes, 1, site), bytes);
    count(__builtin_return_address(0), false, from, bytes, 16);
  }
  Block::current->copies.back().push_back(copy);
}

}  // namespace cuda_on_cpu

namespace prfl {

inline __attribute__((always_inline)) void copy_async(
    void* to_shared, const void* from_global, int bytes = 16, cuda_on_cpu::Site site = cuda_on_cpu::Site::here()) {
  cuda_on_cpu::issue_copy(to_shared, from_global, bytes, site);
}

inline void copy_async_commit() { cuda_on_cpu::Block::current->copies.emplace_back(); }

template <int kPending>
void copy_async_wait() {
  using namespace cuda_on_cpu;
  auto& groups = Block::current->copies;  // the last one is not committed yet
  while (groups.size() > kPending + 1) {
    for (const AsyncCopy& copy : groups.front()) {
      std::memcpy(touch(Space::shared, Kind::write, copy.to, 16, 16, copy.site), copy.bytes.data(), 16);
    }
    groups.pop_front();
  }
}

}  // namespace prfl
