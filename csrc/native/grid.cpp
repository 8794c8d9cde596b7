#include "native/grid.hpp"

#include <algorithm>

namespace prfl::planner {
namespace {

constexpr int kScale = 20;

Int value_of(Int price, Int bytes) { return static_cast<Int>((static_cast<__int128>(price) * bytes) >> kScale); }

}  // namespace

Grid::Grid(const Graph& graph, int shift, Int price)
    : graph_(&graph), shift_(shift), price_(price) {
  const int n = graph.blocks();
  Int size = 0;
  for (int i = 0; i <= n; ++i) {
    start_.push_back(size);
    cells_.push_back((graph.reach[i] >> shift) + 1);
    size += static_cast<Int>(graph.nodes[i].size()) * cells_[i];
  }
  value_.assign(size, kNever);
  for (int a = 0; a < static_cast<int>(graph.nodes[n].size()); ++a)
    std::fill_n(row(n, a), cells_[n], 2 * graph.nodes[n][a].copy);  // nothing is left to hide the last block's copies
  for (int i = n - 1; i >= 0; --i) {
    for (int a = 0; a < static_cast<int>(graph.nodes[i].size()); ++a) {
      Int* to = row(i, a);
      for (const Arc& arc : graph.arcs(i)[a]) {
        const Int first = arc.kept >> shift;
        const Int* from = row(i + 1, arc.target) + first;
        const Int count = std::min({(arc.limit >> shift) + 1, cells_[i], cells_[i + 1] - first});
        const Int cost = priced(arc);
        for (Int x = 0; x < count; ++x) to[x] = std::min(to[x], from[x] + cost);
      }
    }
  }
}

Int Grid::priced(const Arc& arc) const { return arc.cost + value_of(price_, arc.offloaded); }

Int Grid::bound(int boundary, int node, Int prefix, Int taken) const {
  const Int value = row(boundary, node)[prefix >> shift_];
  return value >= kNever || price_ == 0 ? value : value - value_of(price_, graph_->host - taken);
}

Int Grid::offloaded() const {
  Int total = 0, cell = 0;
  int node = 0;
  if (row(0, 0)[0] >= kNever) return 0;
  for (int i = 0; i < graph_->blocks(); ++i) {
    for (const Arc& arc : graph_->arcs(i)[node]) {
      const Int next = cell + (arc.kept >> shift_);
      if (cell > arc.limit >> shift_ || next >= cells_[i + 1]) continue;
      if (priced(arc) + row(i + 1, arc.target)[next] != row(i, node)[cell]) continue;
      total += arc.offloaded;
      cell = next;
      node = arc.target;
      break;
    }
  }
  return total;
}

int shift_for(const Graph& graph, Int work, Int cells) {
  const Int longest = *std::max_element(graph.reach.begin(), graph.reach.end());
  for (int shift = 0;; ++shift) {
    if (longest >> shift >= std::max<Int>(1, cells)) continue;  // one row is too long; nor may the sums overflow
    Int updates = 0, held = 0;
    for (int i = 0; i <= graph.blocks(); ++i) {
      const Int row = (graph.reach[i] >> shift) + 1;
      held += row * static_cast<Int>(graph.nodes[i].size());
      if (i < graph.blocks())
        for (const auto& arcs : graph.arcs(i)) updates += row * static_cast<Int>(arcs.size());
    }
    if ((updates <= work && held <= cells) || longest >> shift == 0) return shift;
  }
}

Int best_price(const Graph& graph, int shift) {
  // At `top` a host full of bytes costs as much as any plan; no price may make the sums overflow.
  const auto whole = [&](Int nanoseconds, Int bytes) {
    return (static_cast<__int128>(nanoseconds) << kScale) / std::max<Int>(1, bytes);
  };
  const __int128 most = std::min(whole(graph.most_cost, graph.host), whole(Int{1} << 58, graph.most_offloaded));
  const Int top = static_cast<Int>(std::clamp<__int128>(most, 1, Int{1} << 58));
  const auto fits = [&](Int price) { return Grid(graph, shift, price).offloaded() <= graph.host; };
  Int low = 0, high = std::max<Int>(1, top / 64);
  while (high < top && !fits(high)) {
    low = high;
    high = std::min(4 * high, top);
  }
  for (int step = 0; step < 8 && high - low > 1; ++step) {
    const Int middle = low + (high - low) / 2;
    (fits(middle) ? high : low) = middle;
  }
  return high;
}

}  // namespace prfl::planner
