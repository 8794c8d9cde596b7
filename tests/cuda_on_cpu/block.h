// One block at a time: its threads as fibers, its barriers, what its warps do together, and why it cannot go on.
#pragma once

#include <array>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "counters.h"
#include "fiber.h"
#include "memory.h"
#include "report.h"

namespace cuda_on_cpu {

struct Index3 {
  unsigned x, y, z;
};

inline std::string text(const Index3& index) {
  return "(" + std::to_string(index.x) + ", " + std::to_string(index.y) + ", " + std::to_string(index.z) + ")";
}

// A small generator whose numbers are the same everywhere.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint64_t next() {
    uint64_t z = state_ += 0x9E3779B97F4A7C15u;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
  }
  size_t below(size_t limit) { return static_cast<size_t>(next() % limit); }

 private:
  uint64_t state_;
};

// Bytes on their way to shared memory; see async_copy.h.
struct AsyncCopy {
  void* to;
  std::array<unsigned char, 16> bytes;
  Site site;
};

struct Thread {
  Fiber fiber;
  Index3 index{};
  unsigned number = 0, warp = 0, lane = 0;
  const char* waits_at = nullptr;  // the function that it waits in; null: it does not wait
  Site site{"", 0};                // of the wait
  std::array<uint32_t, 32> seen{};
  std::deque<std::vector<AsyncCopy>> copies;  // groups of them, the last one still open
};

// A function that the lanes of `mask` call together. `slot[lane]` is what each brings, and where it finds its result.
struct Meeting {
  const char* what;
  uint32_t mask;
  Site site;
  uint32_t arrived = 0;
  std::array<void*, 32> slot{};
};
using Finish = void (*)(Meeting&);

class Block {
 public:
  // Seed 0 runs the threads in order, 1 the latest that can run first; others shuffle them.
  Block(Index3 grid, Index3 size, size_t dynamic_shared, uint64_t seed)
      : grid(grid), size(size), seed_(seed), random_(seed), threads_(size.x * size.y * size.z),
        warps_((threads_.size() + 31) / 32), warps_traffic_(warps_.size()), launch_epoch_(epoch_ + 1) {
    if (dynamic_shared > 0) dynamic_ = std::make_unique<Region>("dynamic", Space::shared, dynamic_shared);
  }

  void run(Index3 block, const std::function<void()>& body) {
    index = block;
    for (auto& region : shared_) region.second->poison();
    if (dynamic_ != nullptr) dynamic_->poison();
    block_epoch_ = ++epoch_;
    alive_ = threads_.size();
    at_barrier_ = 0;
    for (unsigned i = 0; i < threads_.size(); ++i) {
      Thread& thread = threads_[i];
      thread.number = i;
      thread.index = {i % size.x, i / size.x % size.y, i / (size.x * size.y)};
      thread.warp = i / 32;
      thread.lane = i % 32;
      thread.waits_at = nullptr;
      thread.seen.fill(0);
      thread.seen[thread.lane] = 1;
      thread.copies.assign(1, {});
      thread.fiber.start(&body);
      ready_.push_back(i);
    }
    for (auto& warp : warps_) warp = Warp{};
    for (unsigned i = 0; i < threads_.size(); ++i) warps_[i / 32].alive |= 1u << i % 32;
    while (alive_ > 0) {
      if (ready_.empty()) throw Error("deadlock in block " + text(index) + ": " + standstill());
      resume(threads_[pick()]);
    }
    flush();
  }

  // __syncthreads
  void barrier(Site site) {
    Thread& me = *current;
    if (at_barrier_ == 0) barrier_site_ = site;
    if (!(site == barrier_site_)) {
      throw Error(who() + " calls __syncthreads at " + site.text() + " while others wait at another one, in divergent " +
                  "code: " + standstill());
    }
    if (++at_barrier_ < threads_.size()) return wait(me, "__syncthreads", site);
    at_barrier_ = 0;
    ++epoch_;
    flush();
    for (Thread& thread : threads_) {
      if (&thread != &me) wake(thread);
    }
  }

  // Waits for all lanes of the mask that have not exited; the last one calls `finish` for all.
  void meet(const char* what, uint32_t mask, void* slot, Finish finish, Site site) {
    Thread& me = *current;
    Warp& warp = warps_[me.warp];
    if (!(mask >> me.lane & 1u)) {
      throw Error(who() + " (lane " + std::to_string(me.lane) + ") calls " + what + " at " + site.text() +
                  " with a mask of lanes " + ranges(mask) + ", which leaves itself out");
    }
    size_t i = 0;
    while (i < warp.meetings.size() && !(warp.meetings[i].first.what == what && warp.meetings[i].first.mask == mask &&
                                         warp.meetings[i].first.site == site)) {
      ++i;
    }
    if (i == warp.meetings.size()) warp.meetings.push_back({Meeting{what, mask, site}, finish});
    warp.meetings[i].first.arrived |= 1u << me.lane;
    warp.meetings[i].first.slot[me.lane] = slot;
    if (!conclude(me.warp, i)) wait(me, what, site);
  }

  // Lanes of a meeting have seen all that the others of it have seen.
  void connect(uint32_t lanes) {
    std::array<uint32_t, 32> joined{};
    Thread* first = &threads_[current->warp * 32];
    for (unsigned lane = 0; lane < 32; ++lane) {
      if (!(lanes >> lane & 1u)) continue;
      for (unsigned i = 0; i < 32; ++i) joined[i] = std::max(joined[i], first[lane].seen[i]);
    }
    for (unsigned lane = 0; lane < 32; ++lane) {
      if (!(lanes >> lane & 1u)) continue;
      first[lane].seen = joined;
      ++first[lane].seen[lane];
    }
  }

  // One object of shared memory per type, the same for all threads.
  void* shared(const void* type, const char* name, size_t bytes) {
    auto& region = shared_[type];
    if (bytes > 48 << 10) {
      throw Error("block_shared of " + std::to_string(bytes) + " bytes: more than 48 KiB has to be dynamic_shared");
    }
    if (region == nullptr) region = std::make_unique<Region>(name, Space::shared, bytes);
    return reinterpret_cast<void*>(region->address);
  }

  void* dynamic_shared() {
    if (dynamic_ == nullptr) throw Error(who() + " asks for dynamic shared memory, of which the launch gives none");
    return reinterpret_cast<void*>(dynamic_->address);
  }

  // Shared memory is new for each block.
  Actor actor(Space space, Site site) const {
    const uint32_t oldest = space == Space::shared ? block_epoch_ : launch_epoch_;
    return {epoch_, block_epoch_, oldest, current->warp, current->lane, &current->seen, site};
  }
  WarpTraffic& traffic() { return warps_traffic_[current->warp]; }

  std::string who() const { return "thread " + text(current->index) + " of block " + text(index); }
  std::string name_of(const Conflict& other) const {
    if (!other.same_block) return "an earlier block";
    if (other.lane < 0) return "warp " + std::to_string(other.warp);
    return "thread " + text(threads_[other.warp * 32 + static_cast<unsigned>(other.lane)].index);
  }

  inline static Block* running = nullptr;
  inline static Thread* current = nullptr;

  const Index3 grid, size;
  Index3 index{};
  Counters counters;

 private:
  struct Warp {
    uint32_t alive = 0;
    std::vector<std::pair<Meeting, Finish>> meetings;
  };

  unsigned pick() {
    size_t at = seed_ == 0 ? 0 : seed_ == 1 ? ready_.size() - 1 : random_.below(ready_.size());
    const unsigned number = ready_[at];
    if (at == 0) {
      ready_.pop_front();
    } else {
      ready_[at] = ready_.back();
      ready_.pop_back();
    }
    return number;
  }

  void resume(Thread& thread) {
    current = &thread;
    try {
      thread.fiber.resume();
    } catch (const Fault& fault) {
      throw Error(who() + explain(fault));
    }
    if (!thread.fiber.done()) return;
    --alive_;
    warps_[thread.warp].alive &= ~(1u << thread.lane);
    for (size_t i = warps_[thread.warp].meetings.size(); i-- > 0;) conclude(thread.warp, i);
  }

  static std::string explain(const Fault& fault) {
    if (fault.in_stack) return " overflows its stack";
    const Region* region = Region::find(fault.address);
    if (region == nullptr) return " touches an address that is not device memory";
    return " touches " + region->place(fault.address) + " without prfl::" + name(region->space) + "_load or _store";
  }

  void wait(Thread& thread, const char* what, Site site) {
    thread.waits_at = what;
    thread.site = site;
    thread.fiber.suspend();
  }

  void wake(Thread& thread) {
    thread.waits_at = nullptr;
    ready_.push_back(thread.number);
  }

  // True when all have arrived: the meeting is then over.
  bool conclude(unsigned number, size_t i) {
    Warp& warp = warps_[number];
    auto& [meeting, finish] = warp.meetings[i];
    if ((meeting.mask & warp.alive & ~meeting.arrived) != 0) return false;
    finish(meeting);
    const uint32_t arrived = meeting.arrived;
    warp.meetings.erase(warp.meetings.begin() + static_cast<std::ptrdiff_t>(i));
    for (unsigned lane = 0; lane < 32; ++lane) {
      if ((arrived >> lane & 1u) && &threads_[number * 32 + lane] != current) wake(threads_[number * 32 + lane]);
    }
    return true;
  }

  // What each thread does that cannot go on.
  std::string standstill() const {
    std::map<std::string, std::vector<unsigned>> groups;
    for (const Thread& thread : threads_) {
      if (thread.fiber.done()) {
        groups["have exited"].push_back(thread.number);
      } else if (thread.waits_at != nullptr) {
        groups["wait in " + std::string(thread.waits_at) + " at " + thread.site.text()].push_back(thread.number);
      }
    }
    std::string text;
    for (const auto& [what, numbers] : groups) {
      text += (text.empty() ? "" : "; ") + ("threads " + ranges(numbers) + " " + what);
    }
    return text;
  }

  void flush() {
    for (auto& warp : warps_traffic_) warp.flush(counters);
  }

  const uint64_t seed_;
  Random random_;
  std::vector<Thread> threads_;
  std::vector<Warp> warps_;
  std::vector<WarpTraffic> warps_traffic_;
  std::deque<unsigned> ready_;
  std::map<const void*, std::unique_ptr<Region>> shared_;
  std::unique_ptr<Region> dynamic_;
  size_t alive_ = 0, at_barrier_ = 0;
  Site barrier_site_{"", 0};
  inline static uint32_t epoch_ = 0;  // of all launches: a region's shadow outlives them
  uint32_t block_epoch_ = 0;
  const uint32_t launch_epoch_;  // the first one of this launch
};

}  // namespace cuda_on_cpu
