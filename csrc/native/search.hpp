// The search for a plan better than the best one known.
#pragma once

#include "native/grid.hpp"

namespace prfl::planner {

// Labels (prefix, host bytes, time) run from boundary to boundary. Those that can't beat the best plan by the grids'
// bounds are dropped, and those that another label of the same node equals or beats: orders of the same modes in equal
// blocks so become one label, their counts. When more are left than the work allows, the ones with the least bounds go
// on. Improves `plan` in place. Returns the least bound of all that did not go on, kNever when there were none: no plan
// that adds less than it was missed.
Int search(const Graph& graph, const std::vector<Grid>& grids, Int work, Int width, Int candidates, Plan& plan);

}  // namespace prfl::planner
