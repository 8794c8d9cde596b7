#include "native/planner.hpp"

#include <algorithm>
#include <utility>

#include "native/graph.hpp"
#include "native/grid.hpp"
#include "native/least_peak.hpp"
#include "native/search.hpp"
#include "native/simple.hpp"

namespace prfl::planner {
namespace {

// Labels per boundary of the searches that only want a good plan: the wide one then has far less to look at.
constexpr Int kFirstLook = 16;
constexpr Int kSecondLook = 1024;
// Most budgets hold some plan, and to find one takes so many times fewer points than to prove the least peak.
constexpr Int kFewerPoints = 8;

bool proved(const Plan& plan) { return plan.found && plan.bound >= plan.extra; }

// One round: grids as fine as `work` allows, then searches from narrow to wide.
void improve(const Graph& graph, const std::vector<Int>& prices, Int work, Int label_work, const Limits& limits,
             Plan& plan) {
  const Int count = static_cast<Int>(prices.size());
  const int shift = shift_for(graph, work / count, limits.cells / count);
  std::vector<Grid> grids;
  for (const Int price : prices) {
    grids.emplace_back(graph, shift, price);
    plan.bound = std::max(plan.bound, grids.back().bound(0, 0, 0, 0));
  }
  const Int widest = std::max(kFirstLook, std::min(limits.labels / graph.blocks(), limits.candidates / 2));
  for (const Int width : {kFirstLook, kSecondLook, widest}) {
    if (proved(plan)) return;
    if (width > widest) continue;
    const Int lost = search(graph, grids, label_work, width, limits.candidates, plan);
    plan.bound = std::max(plan.bound, plan.found ? std::min(lost, plan.extra) : lost);
  }
}

}  // namespace

Plan solve(const Chain& chain, Int budget, Int host, const Limits& limits,
           const std::vector<std::vector<int>>& seeds) {
  Plan plan;
  const Graph graph(chain, budget, host);
  find_least_peak(chain, graph, limits.points / kFewerPoints, plan);
  if (plan.least > budget && !plan.least_exact) find_least_peak(chain, graph, limits.points, plan);
  if (plan.least <= budget) {
    plan.found = true;
    plan.choice = plan.least_choice;
    plan.extra = added_by(chain, plan.choice);
  } else if (plan.least_exact) {
    return plan;
  }
  std::vector<Int> prices;
  if (graph.host_binds) {
    // Some around the best one, which comes first: further on, with other room left, other prices are best.
    const Int best = best_price(graph, shift_for(graph, limits.coarse_work, limits.cells));
    for (const Int fifths : {5, 4, 6}) prices.push_back(best * fifths / 5);
  }
  prices.push_back(0);
  improve(graph, prices, limits.coarse_work, limits.coarse_labels, limits, plan);
  if (proved(plan)) return plan;
  // A hard chain: whatever becomes of the search, no simple plan shall beat it.
  try_simple_plans(chain, budget, host, seeds, plan);
  improve(graph, prices, limits.middle_work, limits.middle_labels, limits, plan);
  if (!proved(plan)) improve(graph, prices, limits.fine_work, limits.fine_labels, limits, plan);
  return plan;
}

}  // namespace prfl::planner
