// Plans by rules of thumb, so that the search, cut short, is never worse than they are.
#pragma once

#include "native/graph.hpp"

namespace prfl::planner {

// Improves `plan` by the plans of `seeds` that fit, and by greedy ascents: from the leanest plan (of each block the mode
// with the fewest bytes, host included), from the plan of the least peak and from the best seed. An ascent changes one
// block at a time, always the change that saves most time per further byte, while one fits and saves time.
void try_simple_plans(const Chain& chain, Int budget, Int host, const std::vector<std::vector<int>>& seeds, Plan& plan);

}  // namespace prfl::planner
