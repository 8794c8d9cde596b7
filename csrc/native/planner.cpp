#include "native/planner.hpp"

#include <algorithm>
#include <utility>

#include "native/graph.hpp"
#include "native/grid.hpp"
#include "native/least_peak.hpp"
#include "native/search.hpp"

namespace prfl::planner {
namespace {

constexpr Int kFirstLook = 16;  // labels per boundary of the search that only wants a good plan

Int added_by(const Chain& chain, const std::vector<int>& choice) {
  Node node{0, 0};
  Int total = 0;
  for (std::size_t i = 0; i < chain.size(); ++i) {
    const Mode& mode = chain[i][choice[i]];
    total += entered(node, mode);
    node = {mode.offloaded, mode.copy};
  }
  return total + 2 * node.copy;
}

bool proved(const Plan& plan) { return plan.found && plan.bound >= plan.extra; }

// One round: grids as fine as `work` allows, then a narrow search and a wide one.
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
  for (const Int width : {kFirstLook, widest}) {
    if (proved(plan)) return;
    const Int lost = search(graph, grids, label_work, width, limits.candidates, plan);
    plan.bound = std::max(plan.bound, plan.found ? std::min(lost, plan.extra) : lost);
  }
}

}  // namespace

Plan solve(const Chain& chain, Int budget, Int host, const Limits& limits) {
  Plan plan;
  const Graph graph(chain, budget, host);
  find_least_peak(chain, graph, limits.points, plan);
  if (plan.least <= budget) {
    plan.found = true;
    plan.choice = plan.least_choice;
    plan.extra = added_by(chain, plan.choice);
  } else if (plan.least_exact) {
    return plan;
  }
  std::vector<Int> prices{0};
  if (graph.host_binds) {
    // Some around the best one: further on, with other room left, other prices are best.
    const Int best = best_price(graph, shift_for(graph, limits.coarse_work, limits.cells));
    for (const Int fifths : {4, 5, 6}) prices.push_back(best * fifths / 5);
  }
  improve(graph, prices, limits.coarse_work, limits.coarse_labels, limits, plan);
  if (!proved(plan)) improve(graph, prices, limits.fine_work, limits.fine_labels, limits, plan);
  return plan;
}

}  // namespace prfl::planner
