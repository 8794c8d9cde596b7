// What threads do together: barriers of block and warp, votes, shuffles. Votes and shuffles order no memory accesses.
#pragma once

#include <cstdint>
#include <string>

#include "block.h"

inline void __syncthreads(cuda_on_cpu::Site site = cuda_on_cpu::Site::here()) {
  cuda_on_cpu::Block::running->barrier(site);
}

inline void __syncwarp(unsigned mask = ~0u, cuda_on_cpu::Site site = cuda_on_cpu::Site::here()) {
  const auto finish = [](cuda_on_cpu::Meeting& meeting) {
    cuda_on_cpu::Block::running->connect(meeting.arrived);
  };
  cuda_on_cpu::Block::running->meet("__syncwarp", mask, nullptr, finish, site);
}

namespace cuda_on_cpu {

struct Vote {
  bool yes;
  unsigned ballot;
  unsigned voters;  // lanes of the mask that have exited are none
};

inline Vote vote(const char* what, unsigned mask, bool yes, Site site) {
  Vote mine{yes, 0, 0};
  const auto finish = [](Meeting& meeting) {
    unsigned ballot = 0;
    for (unsigned lane = 0; lane < 32; ++lane) {
      if (meeting.arrived >> lane & 1u) ballot |= (static_cast<Vote*>(meeting.slot[lane])->yes ? 1u : 0u) << lane;
    }
    for (unsigned lane = 0; lane < 32; ++lane) {
      if (!(meeting.arrived >> lane & 1u)) continue;
      auto* slot = static_cast<Vote*>(meeting.slot[lane]);
      slot->ballot = ballot;
      slot->voters = meeting.arrived;
    }
  };
  Block::running->meet(what, mask, &mine, finish, site);
  return mine;
}

template <typename T>
struct Shuffle {
  T value;
  unsigned source;
};

template <typename T>
T shuffle(const char* what, unsigned mask, T value, unsigned source, Site site) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "32 or 64 bits");
  Shuffle<T> mine{value, source};
  const auto finish = [](Meeting& meeting) {
    std::array<T, 32> values{};
    for (unsigned lane = 0; lane < 32; ++lane) {
      if (meeting.arrived >> lane & 1u) values[lane] = static_cast<Shuffle<T>*>(meeting.slot[lane])->value;
    }
    for (unsigned lane = 0; lane < 32; ++lane) {
      if (!(meeting.arrived >> lane & 1u)) continue;
      auto* slot = static_cast<Shuffle<T>*>(meeting.slot[lane]);
      if (!(meeting.arrived >> slot->source & 1u)) {
        throw Error(std::string(meeting.what) + " at " + meeting.site.text() + ": lane " + std::to_string(lane) +
                    " reads lane " + std::to_string(slot->source) + ", which is inactive: only lanes " +
                    ranges(meeting.arrived) + " take part");
      }
      slot->value = values[slot->source];
    }
  };
  Block::running->meet(what, mask, &mine, finish, site);
  return mine.value;
}

inline void check_width(const char* what, int width, Site site) {
  if (width < 1 || width > 32 || (width & (width - 1)) != 0) {
    throw Error(std::string(what) + " at " + site.text() + ": expected a width of 1, 2, 4, 8, 16 or 32, got " +
                std::to_string(width));
  }
}

}  // namespace cuda_on_cpu

inline unsigned __ballot_sync(unsigned mask, int predicate, cuda_on_cpu::Site site = cuda_on_cpu::Site::here()) {
  return cuda_on_cpu::vote("__ballot_sync", mask, predicate != 0, site).ballot;
}
inline int __any_sync(unsigned mask, int predicate, cuda_on_cpu::Site site = cuda_on_cpu::Site::here()) {
  return cuda_on_cpu::vote("__any_sync", mask, predicate != 0, site).ballot != 0;
}
inline int __all_sync(unsigned mask, int predicate, cuda_on_cpu::Site site = cuda_on_cpu::Site::here()) {
  const cuda_on_cpu::Vote vote = cuda_on_cpu::vote("__all_sync", mask, predicate != 0, site);
  return vote.ballot == vote.voters;
}

// Groups of `width` neighbouring lanes shuffle among themselves; who would read beyond its group keeps its own value.
template <typename T>
T __shfl_sync(
    unsigned mask, T value, int source, int width = 32, cuda_on_cpu::Site site = cuda_on_cpu::Site::here()) {
  cuda_on_cpu::check_width("__shfl_sync", width, site);
  const unsigned lane = cuda_on_cpu::Block::current->lane, inside = static_cast<unsigned>(width) - 1;
  return cuda_on_cpu::shuffle("__shfl_sync", mask, value, (lane & ~inside) | (source & inside), site);
}
template <typename T>
T __shfl_up_sync(
    unsigned mask, T value, unsigned delta, int width = 32, cuda_on_cpu::Site site = cuda_on_cpu::Site::here()) {
  cuda_on_cpu::check_width("__shfl_up_sync", width, site);
  const unsigned lane = cuda_on_cpu::Block::current->lane, place = lane & (static_cast<unsigned>(width) - 1);
  return cuda_on_cpu::shuffle("__shfl_up_sync", mask, value, place >= delta ? lane - delta : lane, site);
}
template <typename T>
T __shfl_down_sync(
    unsigned mask, T value, unsigned delta, int width = 32, cuda_on_cpu::Site site = cuda_on_cpu::Site::here()) {
  cuda_on_cpu::check_width("__shfl_down_sync", width, site);
  const unsigned lane = cuda_on_cpu::Block::current->lane, last = lane | (static_cast<unsigned>(width) - 1);
  return cuda_on_cpu::shuffle("__shfl_down_sync", mask, value, delta <= last - lane ? lane + delta : lane, site);
}
// Lanes of earlier groups can be read, those of later ones cannot.
template <typename T>
T __shfl_xor_sync(
    unsigned mask, T value, int bits, int width = 32, cuda_on_cpu::Site site = cuda_on_cpu::Site::here()) {
  cuda_on_cpu::check_width("__shfl_xor_sync", width, site);
  const unsigned lane = cuda_on_cpu::Block::current->lane, last = lane | (static_cast<unsigned>(width) - 1);
  const unsigned other = (lane ^ static_cast<unsigned>(bits)) & 31u;
  return cuda_on_cpu::shuffle("__shfl_xor_sync", mask, value, other <= last ? other : lane, site);
}
