// The planner core: which mode each block of a chain runs in, so that the chain stays within a byte budget and the
// added time is least. Exact integers throughout; no torch, no Python. prfl_fast/memory/solver/twin.py is the same
// algorithm, step by step, in Python: a change here is a change there.
#pragma once

#include <cstdint>
#include <vector>

namespace prfl::planner {

using Int = std::int64_t;

constexpr Int kNever = Int{1} << 61;  // a cost that no plan has; two of them still fit into Int

// One way to run a block, normalised by the caller. Bytes and nanoseconds.
struct Mode {
  Int kept;       // held on the device from the block's forward to the end of its backward
  Int peak;       // largest need above what earlier blocks keep, in forward or backward; >= kept
  Int extra;      // added time
  Int offloaded;  // bytes on the host between forward and backward
  Int copy;       // time of one copy of `offloaded`, one way; does not fall when `offloaded` rises
  Int forward;    // compute that hides the previous block's copy out
  Int backward;   // compute that hides the previous block's copy in, `extra` included

  bool operator==(const Mode& other) const {
    return kept == other.kept && peak == other.peak && extra == other.extra && offloaded == other.offloaded &&
           copy == other.copy && forward == other.forward && backward == other.backward;
  }
};

using Chain = std::vector<std::vector<Mode>>;

// How much work a solve may do. Work is counted, never timed, so that a result does not depend on the machine.
struct Limits {
  Int coarse_work;  // cell updates of the first grids
  Int coarse_labels;  // label expansions on them
  Int middle_work;  // of the second
  Int middle_labels;
  Int fine_work;    // of the third
  Int fine_labels;
  Int cells;        // cells held by all grids of a round
  Int labels;       // labels held by a search
  Int candidates;   // labels held before dominated ones are dropped
  Int points;       // points held by the fronts of the least peak
};

struct Plan {
  bool found = false;
  std::vector<int> choice;  // mode of each block
  Int extra = 0;            // total added time, stalls included
  Int bound = 0;            // no feasible plan adds less
  std::vector<int> least_choice;
  Int least = 0;             // peak of the plan `least_choice`
  bool least_exact = true;   // proved: no plan has a lower peak
};

// The fastest plan whose peak stays within `budget` bytes and whose offloaded bytes sum to at most `host`, which allows
// each mode by itself and some plan; sums over the chain stay below 2^59. Never slower than the greedy plan and those of
// `seeds`, as far as they fit.
Plan solve(const Chain& chain, Int budget, Int host, const Limits& limits,
           const std::vector<std::vector<int>>& seeds);

}  // namespace prfl::planner
