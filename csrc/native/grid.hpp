// Lower bounds on the time that the rest of a chain adds, by dynamic programming over rounded prefixes.
#pragma once

#include "native/graph.hpp"

namespace prfl::planner {

// Prefixes are rounded down to cells of 2^shift units, and every byte on the host has a price (a Lagrange multiplier on
// the host's capacity, in 2^-20 ns), refunded for the capacity: both make the value at most the truth.
class Grid {
 public:
  Grid(const Graph& graph, int shift, Int price);

  // At most the time added after `boundary`, for a prefix in units and the host bytes taken so far; kNever: no way.
  Int bound(int boundary, int node, Int prefix, Int taken) const;

  // Host bytes of the rounded plan that attains the value at the start; 0 when there is none.
  Int offloaded() const;

 private:
  const Int* row(int boundary, int node) const { return value_.data() + start_[boundary] + node * cells_[boundary]; }
  Int* row(int boundary, int node) { return value_.data() + start_[boundary] + node * cells_[boundary]; }
  Int priced(const Arc& arc) const;

  const Graph* graph_;
  int shift_;
  Int price_;
  std::vector<Int> cells_;  // of one row of each boundary
  std::vector<Int> start_;  // first cell of each boundary
  std::vector<Int> value_;
};

// The smallest shift with which one grid stays within both limits.
int shift_for(const Graph& graph, Int work, Int cells);

// A price near the one of the largest bound: where the rounded plan begins to fit the host.
Int best_price(const Graph& graph, int shift);

}  // namespace prfl::planner
