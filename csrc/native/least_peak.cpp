#include "native/least_peak.hpp"

#include <algorithm>
#include <tuple>

namespace prfl::planner {
namespace {

struct Point {
  Int taken;  // host bytes from here to the end
  Int need;   // device bytes from here to the end, above what earlier blocks keep
  int mode;
  int next;  // point of the next front
};

// Fewer need with more taken, and every other point left out.
std::vector<Point> undominated(std::vector<Point> points) {
  std::sort(points.begin(), points.end(), [](const Point& a, const Point& b) {
    return std::tie(a.taken, a.need, a.mode, a.next) < std::tie(b.taken, b.need, b.mode, b.next);
  });
  std::vector<Point> best;
  for (const Point& point : points)
    if (best.empty() || point.need < best.back().need) best.push_back(point);
  return best;
}

// Evenly, both ends among them.
std::vector<Point> thinned(const std::vector<Point>& front, Int most) {
  const Int last = static_cast<Int>(front.size()) - 1;
  std::vector<Point> some;
  for (Int j = 0; j < most; ++j) some.push_back(front[j * last / (most - 1)]);
  return some;
}

}  // namespace

void find_least_peak(const Chain& chain, const Graph& graph, Int points, Plan& plan) {
  const int n = graph.blocks();
  Int nodes_left = graph.count_nodes();
  std::vector<std::vector<std::vector<Point>>> fronts(n + 1);
  fronts[n].assign(graph.nodes[n].size(), {Point{0, 0, 0, 0}});
  plan.least_exact = true;
  for (int i = n - 1; i >= 0; --i) {
    for (const Node& node : graph.nodes[i]) {
      std::vector<Point> front;
      for (int m = 0; m < static_cast<int>(chain[i].size()); ++m) {
        const Mode& mode = chain[i][m];
        const auto& rest = fronts[i + 1][target_of(graph.nodes[i + 1], mode.offloaded)];
        for (int j = 0; j < static_cast<int>(rest.size()); ++j) {
          const Int taken = graph.host_binds ? rest[j].taken + mode.offloaded : 0;
          if (taken > graph.host) break;
          front.push_back({taken, std::max(node.offloaded + mode.peak, mode.kept + rest[j].need), m, j});
        }
      }
      front = undominated(std::move(front));
      const Int most = std::max<Int>(16, points / nodes_left);  // what others left unused is shared out again
      if (static_cast<Int>(front.size()) > most) {
        front = thinned(front, most);
        plan.least_exact = false;
      }
      points = std::max<Int>(0, points - static_cast<Int>(front.size()));
      --nodes_left;
      fronts[i].push_back(std::move(front));
    }
  }
  plan.least_choice.clear();
  int node = 0, at = static_cast<int>(fronts[0][0].size()) - 1;
  plan.least = fronts[0][0][at].need;
  for (int i = 0; i < n; ++i) {
    const Point& point = fronts[i][node][at];
    plan.least_choice.push_back(point.mode);
    node = target_of(graph.nodes[i + 1], chain[i][point.mode].offloaded);
    at = point.next;
  }
}

}  // namespace prfl::planner
