// Who touched what since when: finds two unordered accesses to a byte, one of them a write, whatever order they ran in.
//
// Two accesses are ordered if one thread makes both, if a block-wide barrier lies between them (another epoch), or if
// they are made in one warp and __syncwarp connects them: each lane has a clock, which such a call advances, and carries
// the clocks of its warp's lanes as it has seen them. Nothing orders the blocks of one launch.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "report.h"

namespace cuda_on_cpu {

enum class Kind { read, write, atomic };

constexpr const char* name(Kind kind) {
  return kind == Kind::read ? "read" : kind == Kind::write ? "write" : "modification";
}

// The thread that makes an access, and when. Epochs grow by one with each block-wide barrier, block and launch.
struct Actor {
  uint32_t epoch;
  uint32_t block_epoch;   // the first one of its block
  uint32_t oldest_epoch;  // accesses before are over and done with: of earlier launches
  unsigned warp;
  unsigned lane;
  const std::array<uint32_t, 32>* seen;  // clocks of its warp's lanes, its own included
  Site site;
};

// What stands against an access: the other thread is of the same block, or of an earlier one of the same launch.
struct Conflict {
  Kind kind;
  Site site;
  bool same_block;
  uint32_t epoch;
  unsigned warp;  // of the same block
  int lane;       // -1: not known
};

class Shadow {
 public:
  explicit Shadow(size_t bytes) : bytes_(bytes), granules_((bytes + 15) >> log2_) {}

  // Notes the access; the first conflict that it meets goes to `conflict`, with true.
  bool touch(size_t offset, size_t size, Kind kind, const Actor& me, Conflict& conflict) {
    refine(offset | size);
    if (spill_epoch_ != me.epoch) {
      spilled_.clear();
      spill_epoch_ = me.epoch;
    }
    for (size_t g = offset >> log2_; g < (offset + size) >> log2_; ++g) {
      auto& sets = granules_[g].sets;
      for (Kind other : {Kind::write, Kind::read, Kind::atomic}) {
        if (kind == other && kind != Kind::write) continue;
        if (conflicts(sets[static_cast<int>(other)], other, me, conflict)) return true;
      }
      note(sets[static_cast<int>(kind)], me);
    }
    return false;
  }

 private:
  // Accesses of one kind. Exact for what is asked of it: is any of them unordered with a given thread?
  struct Set {
    uint32_t first = 0;  // epoch of the first in this launch
    uint32_t last = 0;   // epoch of the latest; what follows tells of that epoch only
    uint32_t warps = 0;
    uint32_t lanes = 0;   // of the one warp; of no interest once there are two
    uint32_t clock = 0;   // of all of these lanes, unless
    uint32_t spill = 0;   // 1 + place in spilled_ where each lane has its own
    Site site{"", 0};
  };
  struct Granule {
    std::array<Set, 3> sets;
  };

  // Granules are as large as the accesses allow: all bytes of one have the same history.
  void refine(size_t multiple) {
    int wanted = log2_;
    while (multiple & ((size_t{1} << wanted) - 1)) --wanted;
    if (wanted == log2_) return;
    std::vector<Granule> finer((bytes_ + (size_t{1} << wanted) - 1) >> wanted);
    for (size_t g = 0; g < finer.size(); ++g) finer[g] = granules_[g >> (log2_ - wanted)];
    granules_.swap(finer);
    log2_ = wanted;
  }

  uint32_t clock_of(const Set& set, unsigned lane) const {
    return set.spill != 0 ? spilled_[set.spill - 1][lane] : set.clock;
  }

  // The lane of `set` that is unordered with `me`; -1: none. All accesses are of its warp and epoch.
  int unordered_lane(const Set& set, const Actor& me) const {
    for (unsigned lane = 0; lane < 32; ++lane) {
      if ((set.lanes >> lane & 1u) && lane != me.lane && (*me.seen)[lane] < clock_of(set, lane)) return lane;
    }
    return -1;
  }

  bool conflicts(const Set& set, Kind kind, const Actor& me, Conflict& found) const {
    if (set.last < me.oldest_epoch) return false;
    if (set.first < me.block_epoch) {
      found = {kind, set.site, false, set.first, 0, -1};
      return true;
    }
    if (set.last < me.epoch) return false;
    const uint32_t others = set.warps & ~(1u << me.warp);
    if (others != 0) {
      const bool one_warp = (set.warps & (set.warps - 1)) == 0;
      found = {kind, set.site, true, set.last, static_cast<unsigned>(__builtin_ctz(others)),
               one_warp ? __builtin_ctz(set.lanes) : -1};
      return true;
    }
    const int lane = unordered_lane(set, me);
    if (lane < 0) return false;
    found = {kind, set.site, true, set.last, me.warp, lane};
    return true;
  }

  void note(Set& set, const Actor& me) {
    const uint32_t mine = 1u << me.lane, clock = (*me.seen)[me.lane];
    if (set.first < me.oldest_epoch) set.first = me.epoch;
    if (set.last < me.epoch) {
      set = {set.first, me.epoch, 1u << me.warp, mine, clock, 0, me.site};
      return;
    }
    set.warps |= 1u << me.warp;
    if (set.warps != 1u << me.warp) return;
    if (set.spill == 0 && set.clock == clock) {
      set.lanes |= mine;
    } else if (unordered_lane(set, me) < 0) {
      // All before is ordered before this one, and so before whatever is ordered after this one.
      set.lanes = mine;
      set.clock = clock;
      set.spill = 0;
      set.site = me.site;
    } else {
      if (set.spill == 0) {
        spilled_.emplace_back().fill(set.clock);
        set.spill = static_cast<uint32_t>(spilled_.size());
      }
      set.lanes |= mine;
      spilled_[set.spill - 1][me.lane] = clock;
    }
  }

  size_t bytes_;
  int log2_ = 4;
  std::vector<Granule> granules_;
  std::vector<std::array<uint32_t, 32>> spilled_;
  uint32_t spill_epoch_ = 0;
};

}  // namespace cuda_on_cpu
