// The plan that needs the fewest device bytes.
#pragma once

#include "native/graph.hpp"

namespace prfl::planner {

// Sets `least`, `least_choice` and `least_exact`. Where the host's capacity binds, fronts of (host bytes, need) run from
// the end of the chain to its start; a front that outgrows its share of the `points` left is thinned, and the least peak is then
// that of a plan, but not proved.
void find_least_peak(const Chain& chain, const Graph& graph, Int points, Plan& plan);

}  // namespace prfl::planner
