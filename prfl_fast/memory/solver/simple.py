"""Plans by rules of thumb, so that a search that is cut short is never worse than they are; csrc/native/simple.cpp."""

from __future__ import annotations

from itertools import accumulate

from prfl_fast.memory.solver.problem import Best, Chain, Node, Step, added_by, entered


class Ascent:
    """A plan that fits, with what it takes to judge a change of one block in constant time."""

    def __init__(self, chain: Chain, budget: int, host: int, choice: list[int]) -> None:
        self.chain, self.budget, self.host = chain, budget, host
        self.choice = list(choice)
        self._refresh()

    @property
    def fits(self) -> bool:
        """Within both limits."""
        return self.peak[0] <= self.budget and self.taken <= self.host

    def step(self) -> bool:
        """Makes the change that saves most time per further byte; False: none fits and saves time."""
        most_saved, its_bytes, change = 0, 1, None
        for i, block in enumerate(self.chain):
            now = block[self.choice[i]]
            for m, following in enumerate(block):
                saved = self._saved_by(i, now, following)
                if saved <= 0 or not self._fits_with(i, now, following):
                    continue
                more = max(1, following.kept - now.kept + following.offloaded - now.offloaded)
                if saved * its_bytes > most_saved * more:
                    most_saved, its_bytes, change = saved, more, (i, m)
        if change is None:
            return False
        self.choice[change[0]] = change[1]
        self._refresh()
        return True

    def _refresh(self) -> None:
        self.steps = [block[mode] for block, mode in zip(self.chain, self.choice, strict=True)]
        self.before = [Node(0, 0), *(Node(step.offloaded, step.copy) for step in self.steps)]
        self.prefix = [0, *accumulate(step.kept for step in self.steps)]
        self.taken = sum(step.offloaded for step in self.steps)
        self.peak = [0] * (len(self.steps) + 1)  # the largest need of each block and those after it
        for i in reversed(range(len(self.steps))):
            own = self.prefix[i] + self.before[i].offloaded + self.steps[i].peak
            self.peak[i] = max(self.peak[i + 1], own)

    def _saved_by(self, i: int, now: Step, following: Step) -> int:
        own = entered(self.before[i], now) - entered(self.before[i], following)
        if i + 1 == len(self.steps):
            return own + 2 * (now.copy - following.copy)
        after, step = Node(following.offloaded, following.copy), self.steps[i + 1]
        return own + entered(self.before[i + 1], step) - entered(after, step)

    def _fits_with(self, i: int, now: Step, following: Step) -> bool:
        if self.taken - now.offloaded + following.offloaded > self.host:
            return False
        if self.prefix[i] + self.before[i].offloaded + following.peak > self.budget:
            return False
        if i + 1 == len(self.steps):
            return True
        if self.prefix[i] + following.kept + following.offloaded + self.steps[i + 1].peak > self.budget:
            return False
        return self.peak[i + 2] - now.kept + following.kept <= self.budget if i + 2 < len(self.steps) else True


def try_simple_plans(
    chain: Chain, budget: int, host: int, seeds: list[list[int]], least_choice: list[int], best: Best
) -> None:
    """Improves ``best`` by the seeds that fit, and by greedy ascents.

    They start from the leanest plan (of each block the mode with the fewest bytes, host included), from the plan of the
    least peak and from the best seed.
    """
    leanest = [
        min(range(len(block)), key=lambda m: (block[m].kept + block[m].offloaded, block[m].peak, m)) for block in chain
    ]
    fitting = [seed for seed in seeds if Ascent(chain, budget, host, seed).fits]
    for start in (leanest, least_choice, *sorted(fitting, key=lambda seed: added_by(chain, seed))[:1]):
        ascent = Ascent(chain, budget, host, start)
        if not ascent.fits:
            continue
        while ascent.step():
            pass
        added = added_by(chain, ascent.choice)
        if not best.found or added < best.extra:
            best.found, best.extra, best.choice = True, added, ascent.choice
