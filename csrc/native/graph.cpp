#include "native/graph.hpp"

#include <algorithm>
#include <map>
#include <numeric>
#include <tuple>
#include <utility>

namespace prfl::planner {
namespace {

Int stall(Int copy, Int compute) { return std::max<Int>(0, copy - compute); }

// Drops every arc that another one equals or beats in all that counts. A target with fewer offloaded bytes is no worse.
std::vector<Arc> undominated(std::vector<Arc> arcs) {
  std::sort(arcs.begin(), arcs.end(), [](const Arc& a, const Arc& b) {
    return std::tie(a.cost, a.kept, b.limit, a.offloaded, a.mode) <
           std::tie(b.cost, b.kept, a.limit, b.offloaded, b.mode);
  });
  std::vector<Arc> best;
  for (const Arc& arc : arcs) {
    const bool beaten = std::any_of(best.begin(), best.end(), [&](const Arc& other) {
      return other.kept <= arc.kept && other.limit >= arc.limit && other.offloaded <= arc.offloaded;
    });
    if (!beaten) best.push_back(arc);
  }
  return best;
}

std::vector<std::vector<Int>> least_need(const Chain& chain, const Nodes& nodes) {
  const int n = static_cast<int>(chain.size());
  std::vector<std::vector<Int>> need(n + 1);
  need[n].assign(nodes[n].size(), 0);
  for (int i = n - 1; i >= 0; --i) {
    for (const Node& node : nodes[i]) {
      Int least = kNever;
      for (const Mode& mode : chain[i]) {
        const Int rest = need[i + 1][target_of(nodes[i + 1], mode.offloaded)];
        least = std::min(least, std::max(node.offloaded + mode.peak, mode.kept + rest));
      }
      need[i].push_back(least);
    }
  }
  return need;
}

}  // namespace

Nodes make_nodes(const Chain& chain) {
  Nodes nodes{{Node{0, 0}}};
  for (const auto& block : chain) {
    std::map<Int, Int> copies;
    for (const Mode& mode : block) copies.emplace(mode.offloaded, mode.copy);
    std::vector<Node> row;
    for (const auto& [offloaded, copy] : copies) row.push_back({offloaded, copy});
    nodes.push_back(std::move(row));
  }
  return nodes;
}

int target_of(const std::vector<Node>& row, Int offloaded) {
  const auto at = std::lower_bound(row.begin(), row.end(), offloaded,
                                   [](const Node& node, Int bytes) { return node.offloaded < bytes; });
  return static_cast<int>(at - row.begin());
}

Int entered(const Node& node, const Mode& mode) {
  return mode.extra + stall(node.copy, mode.forward) + stall(node.copy, mode.backward);
}

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

Graph::Graph(const Chain& chain, Int budget, Int host)
    : budget(budget), host(host), nodes(make_nodes(chain)), need(least_need(chain, nodes)) {
  Int divisor = 0;
  for (const auto& block : chain) {
    Int cost = 0, offloaded = 0, kept = 0;
    for (const Mode& mode : block) {
      divisor = std::gcd(divisor, mode.kept);
      cost = std::max(cost, mode.extra + 2 * mode.copy);
      offloaded = std::max(offloaded, mode.offloaded);
      kept = std::max(kept, mode.kept);
    }
    most_cost += cost;
    most_offloaded += offloaded;
    most_kept += kept;
  }
  unit = std::max<Int>(1, divisor);
  most_kept /= unit;
  host_binds = most_offloaded > host;
  for (int i = 0; i < static_cast<int>(chain.size()); ++i) {
    if (i >= 2 && chain[i] == chain[i - 1] && chain[i - 1] == chain[i - 2]) {
      table.push_back(table.back());
      continue;
    }
    Arcs arcs;
    for (const Node& node : nodes[i]) {
      std::vector<Arc> row;
      for (int m = 0; m < static_cast<int>(chain[i].size()); ++m) {
        const Mode& mode = chain[i][m];
        const Int room = budget - node.offloaded - mode.peak;
        if (room < 0) continue;
        row.push_back({std::min(room / unit, most_kept), mode.kept / unit, entered(node, mode), mode.offloaded, m,
                       target_of(nodes[i + 1], mode.offloaded)});
      }
      arcs.push_back(undominated(std::move(row)));
    }
    table.push_back(static_cast<int>(tables.size()));
    tables.push_back(std::move(arcs));
  }
  reach.push_back(0);
  for (int i = 0; i < blocks(); ++i) {
    const Int room = budget - *std::min_element(need[i + 1].begin(), need[i + 1].end());
    Int longest = 0;
    for (const auto& row : this->arcs(i))
      for (const Arc& arc : row) longest = std::max(longest, std::min(arc.limit, reach.back()) + arc.kept);
    reach.push_back(std::clamp<Int>(room / unit, 0, longest));
  }
}

Int Graph::count_nodes() const {
  Int count = 0;
  for (const auto& row : nodes) count += static_cast<Int>(row.size());
  return count;
}

}  // namespace prfl::planner
