// The accessors of csrc/common/memory.cuh as the runner has them: every access is checked, noted and counted.
#pragma once

#include <cstring>
#include <string>

#include "block.h"
#include "memory.h"
#include "report.h"

namespace cuda_on_cpu {

// The bytes behind a device address, once the access to them is known to be right.
inline unsigned char* touch(Space space, Kind kind, const void* pointer, size_t size, size_t alignment, Site site) {
  Block& block = *Block::running;
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  const auto complain = [&](const std::string& what) -> Error {
    return Error(what + ": " + name(kind) + " of " + std::to_string(size) + " bytes by " + block.who() + " at " +
                 site.text());
  };
  Region* region = Region::find(address);
  if (region == nullptr) throw complain("wild pointer, in no buffer");
  if (address < region->address || address + size > region->address + region->bytes) {
    throw complain("out of bounds, " + region->place(address));
  }
  if (region->space != space) throw complain("not " + std::string(name(space)) + " memory, " + region->place(address));
  if (address % alignment != 0) {
    throw complain("misaligned, expected a multiple of " + std::to_string(alignment) + ", " + region->place(address));
  }
  Conflict other;
  const size_t offset = address - region->address;
  if (region->shadow.touch(offset, size, kind, block.actor(space, site), other)) {
    throw complain("race, " + region->place(address) + ", with a " + name(other.kind) + " by " +
                   block.name_of(other) + " at " + other.site.text());
  }
  return region->host() + offset;
}

// As a warp's instruction sees it: wide values are moved in pieces that their alignment allows.
inline void count(const void* code, bool store, const void* pointer, size_t size, size_t alignment) {
  Block& block = *Block::running;
  (store ? block.counters.stored : block.counters.loaded) += size;
  const size_t piece = std::min({size, alignment, kWidest});
  for (size_t at = 0; at < size; at += piece) {
    // Each piece is an instruction of its own: a place in the code of its own.
    block.traffic().add(static_cast<const char*>(code) + at, store, Block::current->lane,
                        reinterpret_cast<uintptr_t>(pointer) + at, piece);
  }
}

// Not inlined: the return address tells the places in a kernel apart where one line becomes several.
__attribute__((noinline)) inline void load(Space space, void* into, const void* from, size_t size, size_t alignment,
                                           Site site) {
  std::memcpy(into, touch(space, Kind::read, from, size, alignment, site), size);
  if (space == Space::global) count(__builtin_return_address(0), false, from, size, alignment);
}

__attribute__((noinline)) inline void store(Space space, void* to, const void* from, size_t size, size_t alignment,
                                            Site site) {
  std::memcpy(touch(space, Kind::write, to, size, alignment, site), from, size);
  if (space == Space::global) count(__builtin_return_address(0), true, to, size, alignment);
}

// Replaces *to by change(*to) and returns what was there.
template <typename T, typename Change>
T atomic(T* to, Change change, Site site) {
  const Region* region = Region::find(reinterpret_cast<uintptr_t>(to));
  const Space space = region == nullptr ? Space::global : region->space;
  unsigned char* bytes = touch(space, Kind::atomic, to, sizeof(T), sizeof(T), site);
  T before;
  std::memcpy(&before, bytes, sizeof(T));
  const T after = change(before);
  std::memcpy(bytes, &after, sizeof(T));
  if (space == Space::global) Block::running->counters.atomic += sizeof(T);
  return before;
}

}  // namespace cuda_on_cpu

namespace prfl {

template <typename V>
inline __attribute__((always_inline)) V global_load(
    const V* from, cuda_on_cpu::Site site = cuda_on_cpu::Site::here()) {
  V value;
  cuda_on_cpu::load(cuda_on_cpu::Space::global, &value, from, sizeof(V), alignof(V), site);
  return value;
}

template <typename V>
inline __attribute__((always_inline)) void global_store(
    V* to, const V& value, cuda_on_cpu::Site site = cuda_on_cpu::Site::here()) {
  cuda_on_cpu::store(cuda_on_cpu::Space::global, to, &value, sizeof(V), alignof(V), site);
}

template <typename V>
inline __attribute__((always_inline)) V shared_load(
    const V* from, cuda_on_cpu::Site site = cuda_on_cpu::Site::here()) {
  V value;
  cuda_on_cpu::load(cuda_on_cpu::Space::shared, &value, from, sizeof(V), alignof(V), site);
  return value;
}

template <typename V>
inline __attribute__((always_inline)) void shared_store(
    V* to, const V& value, cuda_on_cpu::Site site = cuda_on_cpu::Site::here()) {
  cuda_on_cpu::store(cuda_on_cpu::Space::shared, to, &value, sizeof(V), alignof(V), site);
}

template <typename S>
S& block_shared() {
  static const char type = 0;  // its address stands for S
  return *static_cast<S*>(cuda_on_cpu::Block::running->shared(&type, "block_shared", sizeof(S)));
}

inline unsigned char* dynamic_shared() {
  return static_cast<unsigned char*>(cuda_on_cpu::Block::running->dynamic_shared());
}

}  // namespace prfl
