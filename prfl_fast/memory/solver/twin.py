"""The planner core in Python: reference of csrc/native, step by step the same, and what runs where that is missing.

The chain is a layered graph. A boundary lies before each block; its nodes are the distinct offloaded sizes of the block
before, for these bytes are still being copied when the block runs. An arc is a mode entered from a node. The state at a
node is (prefix, host bytes, time); the prefix is what earlier blocks keep.

1. The plan of the least peak, exact: does the budget hold any plan at all?
2. Grids over rounded prefixes: lower bounds on the time that the rest of the chain adds.
3. Labels from boundary to boundary, pruned by these bounds and by dominance: the best plan, proved unless labels had to
   be let go; then the least bound among those is the certificate.

Equal blocks need no search of their own. Without stalls a label holds sums over the modes chosen so far, so all orders
of the same counts are one label, and a boundary inside a run never has more labels than there are counts of modes that
fit in some order; dominance leaves fewer. Counts alone would be wrong as soon as anything is offloaded: a copy burdens
the block after it, so that both the peak and the stalls depend on which mode follows which. There the label also names
the last offloaded size, and nothing else of the order matters to the rest of the chain.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from math import gcd
from typing import NamedTuple

import numpy as np

from prfl_fast.memory.solver.problem import NEVER, Best, Chain, Limits, Node, Solution, Step, added_by, entered
from prfl_fast.memory.solver.simple import try_simple_plans

_SCALE = 20  # prices are fixed-point numbers: 2^-20 ns per byte
# Labels per boundary of the searches that only want a good plan: the wide one then has far less to look at.
_FIRST_LOOK = 16
_SECOND_LOOK = 1024
# Most budgets hold some plan, and to find one takes so many times fewer points than to prove the least peak.
_FEWER_POINTS = 8
_NARROWEST = 16  # labels that go on, however little work is left
_KEEP_WORK = 10  # a label that is kept costs about as much as so many that are not


class Arc(NamedTuple):
    """One mode entered from one node; ``limit`` (the largest prefix that leaves it room) and ``kept`` in units."""

    limit: int
    kept: int
    cost: int
    offloaded: int
    mode: int
    target: int


class Label(NamedTuple):
    """One way to get to a node. The order of the fields is the order in which labels are sorted."""

    node: int
    prefix: int
    taken: int
    cost: int
    parent: int
    mode: int
    bound: int


class Graph:
    """Nodes and arcs. Prefixes are counted in units, the greatest common divisor of all kept sizes."""

    def __init__(self, chain: Chain, budget: int, host: int) -> None:
        self.budget, self.host = budget, host
        self.nodes = [[Node(0, 0)]]
        for block in chain:
            copies = {step.offloaded: step.copy for step in block}
            self.nodes.append([Node(offloaded, copies[offloaded]) for offloaded in sorted(copies)])
        self.targets = [{node.offloaded: a for a, node in enumerate(row)} for row in self.nodes]
        self.unit = max(1, gcd(*(step.kept for block in chain for step in block)))
        self.most_cost = sum(max(step.extra + 2 * step.copy for step in block) for block in chain)
        self.most_offloaded = sum(max(step.offloaded for step in block) for block in chain)
        self.host_binds = self.most_offloaded > host
        self.need = self._least_need(chain)
        self.most_kept = sum(max(step.kept for step in block) for block in chain) // self.unit
        self.arcs: list[list[list[Arc]]] = []
        for i, block in enumerate(chain):
            if i >= 2 and block == chain[i - 1] == chain[i - 2]:
                self.arcs.append(self.arcs[-1])
            else:
                self.arcs.append([self._arcs_of(node, block, self.targets[i + 1]) for node in self.nodes[i]])
        self.reach = [0]  # by boundary: no prefix of a plan within the budget is longer there, in units
        for arcs, need in zip(self.arcs, self.need[1:], strict=True):
            longest = max((min(arc.limit, self.reach[-1]) + arc.kept for row in arcs for arc in row), default=0)
            self.reach.append(min(max((budget - min(need)) // self.unit, 0), longest))
        self.count_nodes = sum(map(len, self.nodes))

    def _least_need(self, chain: Chain) -> list[list[int]]:
        """By boundary and node: the least budget of the rest, were there no prefix and no limit of the host."""
        need = [[0] * len(row) for row in self.nodes]
        for i in reversed(range(len(chain))):
            for a, node in enumerate(self.nodes[i]):
                need[i][a] = min(
                    max(node.offloaded + step.peak, step.kept + need[i + 1][self.targets[i + 1][step.offloaded]])
                    for step in chain[i]
                )
        return need

    def _arcs_of(self, node: Node, block: list[Step], targets: dict[int, int]) -> list[Arc]:
        arcs = []
        for m, step in enumerate(block):
            room = self.budget - node.offloaded - step.peak
            if room >= 0:
                limit, kept = min(room // self.unit, self.most_kept), step.kept // self.unit
                arcs.append(Arc(limit, kept, entered(node, step), step.offloaded, m, targets[step.offloaded]))
        arcs.sort(key=lambda arc: (arc.cost, arc.kept, -arc.limit, arc.offloaded, arc.mode))
        best: list[Arc] = []
        for arc in arcs:  # a target with fewer offloaded bytes is no worse
            if not any(o.kept <= arc.kept and o.limit >= arc.limit and o.offloaded <= arc.offloaded for o in best):
                best.append(arc)
        return best


class Grid:
    """Lower bounds on the time that the rest of the chain adds.

    Prefixes are rounded down to cells of 2^shift units, and every byte on the host has a price, refunded for the
    host's capacity: both make the value at most the truth.
    """

    def __init__(self, graph: Graph, shift: int, price: int) -> None:
        self.graph, self.shift, self.price = graph, shift, price
        self.value = [
            [np.full((reach >> shift) + 1, NEVER, dtype=np.int64) for _ in row]
            for row, reach in zip(graph.nodes, graph.reach, strict=True)
        ]
        for row, node in zip(self.value[-1], graph.nodes[-1], strict=True):
            row[:] = 2 * node.copy  # nothing is left to hide the last block's copies
        for i in reversed(range(len(graph.arcs))):
            for row, arcs in zip(self.value[i], graph.arcs[i], strict=True):
                for arc in arcs:
                    start = arc.kept >> shift
                    after = self.value[i + 1][arc.target][start:]
                    count = min((arc.limit >> shift) + 1, len(row), len(after))
                    np.minimum(row[:count], after[:count] + self.priced(arc), out=row[:count])

    def priced(self, arc: Arc) -> int:
        """Cost of the arc and of its bytes on the host."""
        return arc.cost + (self.price * arc.offloaded >> _SCALE)

    def bound(self, boundary: int, node: int, prefix: int, taken: int) -> int:
        """At most the time added after ``boundary``; NEVER: there is no way."""
        value = int(self.value[boundary][node][prefix >> self.shift])
        return value if value >= NEVER else value - (self.price * (self.graph.host - taken) >> _SCALE)

    def offloaded(self) -> int:
        """Host bytes of the rounded plan that attains the value at the start; 0 when there is none."""
        total = cell = node = 0
        if self.value[0][0][0] >= NEVER:
            return 0
        for i, arcs in enumerate(self.graph.arcs):
            for arc in arcs[node]:
                after = cell + (arc.kept >> self.shift)
                rest = self.value[i + 1][arc.target]
                if (
                    cell <= arc.limit >> self.shift
                    and after < len(rest)
                    and self.priced(arc) + rest[after] == self.value[i][node][cell]
                ):
                    total, cell, node = total + arc.offloaded, after, arc.target
                    break
        return total


def shift_for(graph: Graph, work: int, cells: int) -> int:
    """The smallest shift with which one grid stays within both limits."""
    longest = max(graph.reach)
    arcs = [sum(map(len, rows)) for rows in graph.arcs]
    shift = 0
    while longest >> shift:
        rows = [(reach >> shift) + 1 for reach in graph.reach]
        if (
            longest >> shift < cells
            and sum(row * count for row, count in zip(rows, arcs, strict=False)) <= work
            and sum(row * len(nodes) for row, nodes in zip(rows, graph.nodes, strict=True)) <= cells
        ):
            break
        shift += 1
    return shift


def best_price(graph: Graph, shift: int) -> int:
    """A price near the one of the largest bound: where the rounded plan begins to fit the host."""
    # At `top` a host full of bytes costs as much as any plan; no price may make the sums overflow.
    most = min((graph.most_cost << _SCALE) // max(1, graph.host), (1 << 58 + _SCALE) // max(1, graph.most_offloaded))
    top = min(max(most, 1), 1 << 58)

    def fits(price: int) -> bool:
        return Grid(graph, shift, price).offloaded() <= graph.host

    low, high = 0, max(1, top // 64)
    while high < top and not fits(high):
        low, high = high, min(4 * high, top)
    for _ in range(8):
        if high - low <= 1:
            break
        middle = low + (high - low) // 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high


def least_peak(chain: Chain, graph: Graph, points: int) -> tuple[list[int], int, bool]:
    """The plan of the least peak, its peak, and whether that is proved.

    Fronts of (host bytes, need, mode, next point) run from the end of the chain to its start. One that outgrows its
    share of the points left is thinned, and the result is then a plan's peak, but not proved.
    """
    nodes_left = graph.count_nodes
    exact = True
    fronts = [[[(0, 0, 0, 0)] for _ in row] for row in graph.nodes]
    for i in reversed(range(len(chain))):
        for a, node in enumerate(graph.nodes[i]):
            every = []
            for m, step in enumerate(chain[i]):
                for j, (taken, need, _, _) in enumerate(fronts[i + 1][graph.targets[i + 1][step.offloaded]]):
                    taken = taken + step.offloaded if graph.host_binds else 0
                    if taken > graph.host:
                        break
                    every.append((taken, max(node.offloaded + step.peak, step.kept + need), m, j))
            front: list[tuple[int, int, int, int]] = []
            for point in sorted(every):
                if not front or point[1] < front[-1][1]:
                    front.append(point)
            most = max(16, points // nodes_left)  # what others left unused is shared out again
            if len(front) > most:
                front = [front[j * (len(front) - 1) // (most - 1)] for j in range(most)]
                exact = False
            points, nodes_left = max(0, points - len(front)), nodes_left - 1
            fronts[i][a] = front
    choice = []
    node_index, at = 0, len(fronts[0][0]) - 1
    least = fronts[0][0][at][1]
    for i in range(len(chain)):
        _, _, m, following = fronts[i][node_index][at]
        choice.append(m)
        node_index, at = graph.targets[i + 1][chain[i][m].offloaded], following
    return choice, least, exact


def undominated(labels: list[Label]) -> list[Label]:
    """The labels that no other one of their node equals or beats in prefix, host bytes and cost."""
    kept: list[Label] = []
    taken: list[int] = []  # a staircase: host bytes up, costs down
    costs: dict[int, int] = {}
    for label in sorted(labels):
        if not kept or kept[-1].node != label.node:
            taken, costs = [], {}
        above = bisect_right(taken, label.taken)
        if above and costs[taken[above - 1]] <= label.cost:
            continue
        if label.taken not in costs:
            insort(taken, label.taken)
        costs[label.taken] = label.cost
        first = last = bisect_left(taken, label.taken) + 1
        while last < len(taken) and costs[taken[last]] >= label.cost:
            del costs[taken[last]]
            last += 1
        del taken[first:last]
        kept.append(label)
    return kept


def compact(labels: list[Label], width: int) -> tuple[list[Label], int]:
    """Without what is dominated, then without what is too much; and the least bound of the latter."""
    labels = undominated(labels)
    if len(labels) <= width:
        return labels, NEVER
    labels.sort(key=lambda label: (label.bound, label))
    return sorted(labels[:width]), labels[width].bound


def search(graph: Graph, grids: list[Grid], work: int, width: int, candidates: int, best: Best) -> int:
    """Looks for a plan better than ``best`` and puts it there.

    Returns the least bound of all labels that did not go on for want of work: no better plan than that was missed.
    """
    n = len(graph.arcs)
    left = [0] * (n + 1)  # arcs from each block to the end
    for i in reversed(range(n)):
        left[i] = left[i + 1] + max(1, *map(len, graph.arcs[i]))
    trail: list[list[tuple[int, int]]] = []
    labels = [Label(0, 0, 0, 0, 0, 0, 0)]
    lost = NEVER
    rate = 1  # work of one expansion in the block before
    for i in range(n):
        # Twice an even share: most blocks use less than theirs.
        wide = min(max(2 * work // (left[i] * rate), _NARROWEST), width)
        opened = kept = 0
        following: list[Label] = []
        for parent, label in enumerate(labels):
            for arc in graph.arcs[i][label.node]:
                opened += 1
                prefix, taken = label.prefix + arc.kept, label.taken + arc.offloaded
                if label.prefix > arc.limit or taken > graph.host:
                    continue
                if prefix * graph.unit + graph.need[i + 1][arc.target] > graph.budget:
                    continue
                cost = label.cost + arc.cost
                rest, too_much = 0, best.extra - cost if best.found else NEVER
                for grid in grids:
                    if rest < too_much:
                        rest = max(rest, grid.bound(i + 1, arc.target, prefix, taken))
                if rest >= too_much:
                    continue
                kept += 1
                following.append(Label(arc.target, prefix, taken, cost, parent, arc.mode, cost + rest))
            if len(following) >= candidates:
                following, dropped = compact(following, wide)
                lost = min(lost, dropped)
        labels, dropped = compact(following, wide)
        lost = min(lost, dropped)
        spent = opened + _KEEP_WORK * kept
        rate = max(1, spent // max(1, opened))
        work = max(0, work - spent)
        trail.append([(label.parent, label.mode) for label in labels])
    if labels:
        # At the last boundary the rest is exact, and so a bound is a plan's added time.
        at = min(range(len(labels)), key=lambda index: (labels[index].bound, labels[index]))
        best.found, best.extra, best.choice = True, labels[at].bound, []
        for steps in reversed(trail):
            at, mode = steps[at]
            best.choice.insert(0, mode)
    return lost


def improve(graph: Graph, prices: list[int], work: int, label_work: int, limits: Limits, best: Best) -> None:
    """One round: grids as fine as ``work`` allows, then searches from narrow to wide."""
    shift = shift_for(graph, work // len(prices), limits.cells // len(prices))
    grids = [Grid(graph, shift, price) for price in prices]
    best.bound = max(best.bound, *(grid.bound(0, 0, 0, 0) for grid in grids))
    widest = max(_FIRST_LOOK, min(limits.labels // len(graph.arcs), limits.candidates // 2))
    for width in (_FIRST_LOOK, _SECOND_LOOK, widest):
        if best.proved:
            return
        if width > widest:
            continue
        lost = search(graph, grids, label_work, width, limits.candidates, best)
        best.bound = max(best.bound, min(lost, best.extra) if best.found else lost)


def solve(chain: Chain, budget: int, host: int, limits: Limits, seeds: list[list[int]]) -> Solution:
    """The fastest plan whose peak stays within ``budget`` bytes and whose offloaded bytes sum to at most ``host``.

    Never slower than the greedy plan and those of ``seeds``, as far as they fit.
    """
    graph = Graph(chain, budget, host)
    least_choice, least, exact = least_peak(chain, graph, limits.points // _FEWER_POINTS)
    if least > budget and not exact:
        least_choice, least, exact = least_peak(chain, graph, limits.points)
    best = Best()
    if least <= budget:
        best.found, best.choice, best.extra = True, least_choice, added_by(chain, least_choice)
    if best.found or not exact:
        prices = []
        if graph.host_binds:
            # Some around the best one, which comes first: further on, with other room left, other prices are best.
            price = best_price(graph, shift_for(graph, limits.coarse_work, limits.cells))
            prices += [price * fifths // 5 for fifths in (5, 4, 6)]
        prices.append(0)
        improve(graph, prices, limits.coarse_work, limits.coarse_labels, limits, best)
        if not best.proved:
            # A hard chain: whatever becomes of the search, no simple plan shall beat it.
            try_simple_plans(chain, budget, host, seeds, least_choice, best)
            improve(graph, prices, limits.middle_work, limits.middle_labels, limits, best)
        if not best.proved:
            improve(graph, prices, limits.fine_work, limits.fine_labels, limits, best)
    return Solution(best.found, best.choice, best.extra, best.bound, least_choice, least, exact)
