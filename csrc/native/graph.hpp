// The chain as a layered graph: boundaries between blocks, nodes at each, one arc per mode and node.
#pragma once

#include "native/planner.hpp"

namespace prfl::planner {

// What a block needs to know of the block before it: the bytes that are being copied, and how long one copy takes.
struct Node {
  Int offloaded;
  Int copy;
};

// One mode of a block, entered from one node. Prefixes (what earlier blocks keep) are counted in units, the greatest
// common divisor of all kept sizes: that loses nothing.
struct Arc {
  Int limit;  // largest prefix with which the mode fits the budget
  Int kept;
  Int cost;   // added time and the stalls of the previous block's copies
  Int offloaded;
  int mode;
  int target;
};

using Arcs = std::vector<std::vector<Arc>>;  // by node
using Nodes = std::vector<std::vector<Node>>;  // by boundary; boundary i lies before block i

// The distinct offloaded sizes of the block before each boundary, ascending.
Nodes make_nodes(const Chain& chain);

// The node that a mode leads to.
int target_of(const std::vector<Node>& row, Int offloaded);

// Added time of a mode that is entered from a node.
Int entered(const Node& node, const Mode& mode);

// Added time of a plan, stalls included.
Int added_by(const Chain& chain, const std::vector<int>& choice);

struct Graph {
  Graph(const Chain& chain, Int budget, Int host);

  int blocks() const { return static_cast<int>(table.size()); }
  const Arcs& arcs(int block) const { return tables[table[block]]; }
  Int count_nodes() const;

  Int budget;
  Int host;
  Nodes nodes;
  std::vector<Arcs> tables;
  std::vector<int> table;   // of each block; equal blocks in a row share one
  std::vector<std::vector<Int>> need;  // by boundary and node: the least budget of the rest, were there no prefix
  Int unit = 1;
  Int most_kept = 0;        // no prefix is longer, in units
  std::vector<Int> reach;   // by boundary: no prefix of a plan within the budget is longer there, in units
  Int most_cost = 0;        // no plan adds more
  Int most_offloaded = 0;   // no plan offloads more
  bool host_binds = false;  // some plan offloads more than the host holds
};

}  // namespace prfl::planner
