// Global memory traffic: bytes that threads ask for, and 32-byte sectors that the accesses of a warp touch.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <unordered_map>
#include <vector>

namespace cuda_on_cpu {

constexpr size_t kSector = 32;
constexpr size_t kWidest = 16;  // bytes that one thread moves in one instruction

struct Counters {
  uint64_t loaded = 0;  // bytes
  uint64_t stored = 0;
  uint64_t atomic = 0;
  uint64_t load_sectors = 0;
  uint64_t store_sectors = 0;
};

// Lanes run one after the other here. The n-th time that a lane passes a place in the code is taken for the same
// instruction as the n-th time that the others of its warp pass it since the last barrier of the block.
class WarpTraffic {
 public:
  void add(const void* code, bool store, unsigned lane, uintptr_t address, size_t size) {
    Place& place = places_[code];
    place.store = store;
    const size_t turn = place.turns[lane]++;
    if (turn >= place.sectors.size()) place.sectors.resize(turn + 1);
    auto& touched = place.sectors[turn];
    for (uintptr_t sector = address / kSector; sector <= (address + size - 1) / kSector; ++sector) {
      if (std::find(touched.rbegin(), touched.rend(), sector) == touched.rend()) touched.push_back(sector);
    }
  }

  void flush(Counters& counters) {
    for (auto& [code, place] : places_) {
      for (auto& touched : place.sectors) {
        (place.store ? counters.store_sectors : counters.load_sectors) += touched.size();
        touched.clear();
      }
      place.turns.fill(0);
    }
  }

 private:
  struct Place {
    bool store = false;
    std::array<uint32_t, 32> turns{};
    std::vector<std::vector<uintptr_t>> sectors;
  };
  std::unordered_map<const void*, Place> places_;
};

}  // namespace cuda_on_cpu
