#include "native/simple.hpp"

#include <algorithm>
#include <tuple>
#include <utility>

namespace prfl::planner {
namespace {

using Choice = std::vector<int>;

Node node_of(const Mode& mode) { return {mode.offloaded, mode.copy}; }

// A plan that fits, with what it takes to judge a change of one block in constant time.
class Ascent {
 public:
  Ascent(const Chain& chain, Int budget, Int host, Choice choice)
      : chain_(chain), budget_(budget), host_(host), choice_(std::move(choice)) {
    refresh();
  }

  const Choice& choice() const { return choice_; }
  bool fits() const { return peak_[0] <= budget_ && taken_ <= host_; }

  // Makes the best change; false: there is none.
  bool step() {
    Int most_saved = 0, its_bytes = 1;
    int block = -1, to = -1;
    for (int i = 0; i < static_cast<int>(chain_.size()); ++i) {
      for (int m = 0; m < static_cast<int>(chain_[i].size()); ++m) {
        const Int saved = saved_by(i, m);
        if (saved <= 0 || !fits_with(i, m)) continue;
        const Mode &now = mode(i), &next = chain_[i][m];
        const Int bytes = std::max<Int>(1, next.kept - now.kept + next.offloaded - now.offloaded);
        if (static_cast<__int128>(saved) * its_bytes <= static_cast<__int128>(most_saved) * bytes) continue;
        most_saved = saved, its_bytes = bytes, block = i, to = m;
      }
    }
    if (block < 0) return false;
    choice_[block] = to;
    refresh();
    return true;
  }

 private:
  const Mode& mode(int i) const { return chain_[i][choice_[i]]; }
  Node before(int i) const { return i > 0 ? node_of(mode(i - 1)) : Node{0, 0}; }

  void refresh() {
    const int n = static_cast<int>(chain_.size());
    prefix_.assign(n + 1, 0);
    peak_.assign(n + 1, 0);
    taken_ = 0;
    for (int i = 0; i < n; ++i) {
      prefix_[i + 1] = prefix_[i] + mode(i).kept;
      taken_ += mode(i).offloaded;
    }
    for (int i = n - 1; i >= 0; --i)
      peak_[i] = std::max(peak_[i + 1], prefix_[i] + before(i).offloaded + mode(i).peak);
  }

  Int saved_by(int i, int m) const {
    const Mode &now = mode(i), &next = chain_[i][m];
    const Int own = entered(before(i), now) - entered(before(i), next);
    if (i + 1 == static_cast<int>(chain_.size())) return own + 2 * (now.copy - next.copy);
    return own + entered(node_of(now), mode(i + 1)) - entered(node_of(next), mode(i + 1));
  }

  bool fits_with(int i, int m) const {
    const int n = static_cast<int>(chain_.size());
    const Mode &now = mode(i), &next = chain_[i][m];
    if (taken_ - now.offloaded + next.offloaded > host_) return false;
    if (prefix_[i] + before(i).offloaded + next.peak > budget_) return false;
    const Int prefix = prefix_[i] + next.kept;
    if (i + 1 < n && prefix + next.offloaded + mode(i + 1).peak > budget_) return false;
    return i + 2 >= n || peak_[i + 2] - now.kept + next.kept <= budget_;
  }

  const Chain& chain_;
  Int budget_, host_;
  Choice choice_;
  std::vector<Int> prefix_;  // kept before each block
  std::vector<Int> peak_;    // the largest need of each block and those after it
  Int taken_ = 0;
};

Choice leanest(const Chain& chain) {
  Choice choice;
  for (const auto& block : chain) {
    const auto best = std::min_element(block.begin(), block.end(), [](const Mode& a, const Mode& b) {
      return std::make_tuple(a.kept + a.offloaded, a.peak) < std::make_tuple(b.kept + b.offloaded, b.peak);
    });
    choice.push_back(static_cast<int>(best - block.begin()));
  }
  return choice;
}

}  // namespace

void try_simple_plans(const Chain& chain, Int budget, Int host, const std::vector<Choice>& seeds, Plan& plan) {
  std::vector<Choice> starts{leanest(chain), plan.least_choice};
  const Choice* best = nullptr;
  for (const Choice& seed : seeds)
    if (Ascent(chain, budget, host, seed).fits() &&
        (best == nullptr || added_by(chain, seed) < added_by(chain, *best)))
      best = &seed;
  if (best != nullptr) starts.push_back(*best);
  for (const Choice& start : starts) {
    Ascent ascent(chain, budget, host, start);
    if (!ascent.fits()) continue;
    while (ascent.step()) {
    }
    const Int added = added_by(chain, ascent.choice());
    if (plan.found && added >= plan.extra) continue;
    plan.found = true;
    plan.extra = added;
    plan.choice = ascent.choice();
  }
}

}  // namespace prfl::planner
