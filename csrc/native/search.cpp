#include "native/search.hpp"

#include <algorithm>
#include <iterator>
#include <tuple>
#include <utility>

namespace prfl::planner {
namespace {

constexpr Int kNarrowest = 16;  // labels that go on, however little work is left
constexpr Int kKeepWork = 10;    // a label that is kept costs about as much as so many that are not

struct Label {
  int node;
  Int prefix;  // units
  Int taken;   // host bytes
  Int cost;
  int parent;
  int mode;
  Int bound;
};

// Objects, not functions: so that sorting inlines them.
constexpr auto by_state = [](const Label& a, const Label& b) {
  if (a.node != b.node) return a.node < b.node;
  if (a.prefix != b.prefix) return a.prefix < b.prefix;
  return std::tie(a.taken, a.cost, a.parent, a.mode) < std::tie(b.taken, b.cost, b.parent, b.mode);
};

constexpr auto by_bound = [](const Label& a, const Label& b) {
  return a.bound != b.bound ? a.bound < b.bound : by_state(a, b);
};

void drop_dominated(std::vector<Label>& labels) {
  std::sort(labels.begin(), labels.end(), by_state);
  // Host bytes -> least cost so far with at most as many; costs fall from step to step.
  std::vector<std::pair<Int, Int>> stairs;
  int node = -1;
  std::size_t kept = 0;
  for (std::size_t i = 0; i < labels.size(); ++i) {
    const Label label = labels[i];
    if (label.node != node) stairs.clear();
    node = label.node;
    const auto above = std::upper_bound(stairs.begin(), stairs.end(), label.taken,
                                        [](Int taken, const auto& stair) { return taken < stair.first; });
    if (above != stairs.begin() && std::prev(above)->second <= label.cost) continue;
    const auto at = above != stairs.begin() && std::prev(above)->first == label.taken ? std::prev(above) : above;
    auto end = at;
    while (end != stairs.end() && end->second >= label.cost) ++end;
    if (end == at) {
      stairs.insert(at, {label.taken, label.cost});
    } else {
      *at = {label.taken, label.cost};
      stairs.erase(std::next(at), end);
    }
    labels[kept++] = label;
  }
  labels.resize(kept);
}

// Drops what is dominated, then what is too much. Returns the least bound of the latter.
Int compact(std::vector<Label>& labels, Int width) {
  drop_dominated(labels);
  if (static_cast<Int>(labels.size()) <= width) return kNever;
  std::nth_element(labels.begin(), labels.begin() + width, labels.end(), by_bound);
  const Int lost = labels[width].bound;
  labels.resize(width);
  std::sort(labels.begin(), labels.end(), by_state);  // neighbours read the grids' neighbouring cells
  return lost;
}

// Arcs from each block to the end of the chain, of the node with the most.
std::vector<Int> arcs_left(const Graph& graph) {
  std::vector<Int> left(graph.blocks() + 1, 0);
  for (int i = graph.blocks() - 1; i >= 0; --i) {
    std::size_t most = 1;
    for (const auto& row : graph.arcs(i)) most = std::max(most, row.size());
    left[i] = left[i + 1] + static_cast<Int>(most);
  }
  return left;
}

}  // namespace

Int search(const Graph& graph, const std::vector<Grid>& grids, Int work, Int width, Int candidates, Plan& plan) {
  const int n = graph.blocks();
  const std::vector<Int> left = arcs_left(graph);
  std::vector<std::vector<int>> parents(n), modes(n);
  std::vector<Label> labels{Label{}}, next;
  Int lost = kNever;
  Int rate = 1;  // work of one expansion in the block before
  for (int i = 0; i < n; ++i) {
    // Twice an even share: most blocks use less than theirs.
    const Int wide = std::clamp(2 * work / (left[i] * rate), kNarrowest, width);
    Int opened = 0, kept = 0;
    next.clear();
    for (int parent = 0; parent < static_cast<int>(labels.size()); ++parent) {
      const Label& label = labels[parent];
      for (const Arc& arc : graph.arcs(i)[label.node]) {
        ++opened;
        const Int prefix = label.prefix + arc.kept, taken = label.taken + arc.offloaded;
        if (label.prefix > arc.limit || taken > graph.host) continue;
        if (prefix * graph.unit + graph.need[i + 1][arc.target] > graph.budget) continue;
        const Int cost = label.cost + arc.cost;
        Int rest = 0;
        const auto hopeless = [&] { return plan.found ? cost + rest >= plan.extra : rest >= kNever; };
        for (std::size_t g = 0; g < grids.size() && !hopeless(); ++g)
          rest = std::max(rest, grids[g].bound(i + 1, arc.target, prefix, taken));
        if (hopeless()) continue;
        ++kept;
        next.push_back({arc.target, prefix, taken, cost, parent, arc.mode, cost + rest});
      }
      if (static_cast<Int>(next.size()) >= candidates) lost = std::min(lost, compact(next, wide));
    }
    lost = std::min(lost, compact(next, wide));
    const Int spent = opened + kKeepWork * kept;
    rate = std::max<Int>(1, spent / std::max<Int>(1, opened));
    work = std::max<Int>(0, work - spent);
    labels.swap(next);
    for (const Label& label : labels) {
      parents[i].push_back(label.parent);
      modes[i].push_back(label.mode);
    }
  }
  // At the last boundary the rest is exact, and so a bound is a plan's added time.
  const auto best = std::min_element(labels.begin(), labels.end(), by_bound);
  if (best == labels.end()) return lost;
  plan.found = true;
  plan.extra = best->bound;
  plan.choice.assign(n, 0);
  int at = static_cast<int>(best - labels.begin());
  for (int i = n - 1; i >= 0; --i) {
    plan.choice[i] = modes[i][at];
    at = parents[i][at];
  }
  return lost;
}

}  // namespace prfl::planner
