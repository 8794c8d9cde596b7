"""From the costs of calls and the moments of a chain to the fastest keep-sets that stay below a budget.

A chain is a row of moments: forwards of network calls, and backwards ("walks"), each with the bytes beside it.
Calls that are recomputed share one keep-set a block; the last differentiated call, whose graph may be kept from its
forward on, has its own. So there are two chains of blocks, each solved by :func:`prfl_fast.memory.solve_chain`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from prfl_fast.memory.block_cost import BlockCost
from prfl_fast.memory.call_cost import CallCost
from prfl_fast.memory.keeps import ALL, NOTHING
from prfl_fast.memory.peaks import call_peaks
from prfl_fast.memory.plan import InfeasibleBudget
from prfl_fast.memory.roofline import Device
from prfl_fast.memory.solver.chain import Mode, solve_chain

Keeps = tuple[str, ...]


@dataclass(frozen=True)
class Forward:
    """A call's forward that keeps nothing: ``live`` bytes when it begins, ``peak`` bytes above them; ``beside`` the
    graph of the kept call or not."""

    live: int
    peak: int
    beside: bool


@dataclass(frozen=True)
class Walk:
    """A call's backward: its ``network``, what it costs, the ``live`` bytes when it begins (gradients in place
    included), and whether it makes gradients that stay."""

    network: int
    call: CallCost
    live: int
    growing: bool


@dataclass(frozen=True)
class KeptCall:
    """The call whose graph is kept: its backward, and the bytes that live when its forward begins."""

    walk: Walk
    live: int


@dataclass(frozen=True)
class Moments:
    """A chain: its forwards, the walks of recomputed calls, the call whose graph is kept (None: it is among the
    walks), and the ``peak`` of what is no call, with the part of it that is beside the kept call."""

    forwards: tuple[Forward, ...]
    walks: tuple[Walk, ...]
    kept: KeptCall | None
    peak: int
    peak_beside: int


@dataclass(frozen=True)
class Choice:
    """Keep-sets of the recomputed calls, by network, and of the kept call; ``peak`` bytes, ``extra_ns`` of what is
    recomputed in the whole chain."""

    keeps: tuple[Keeps, ...]
    last: Keeps | None
    peak: int
    extra_ns: int


def peak_of(moments: Moments, keeps: Sequence[Keeps], last: Keeps | None) -> int:
    """Bytes that a chain needs with these keep-sets."""
    peak, beside = moments.peak, 0
    if moments.kept is not None and last is not None:
        walk = moments.kept.walk
        own = call_peaks(walk.call, last, growing=walk.growing, from_forward=True)
        beside = own.kept
        peak = max(peak, moments.peak_beside + beside, moments.kept.live + own.forward, walk.live + own.backward)
    for forward in moments.forwards:
        peak = max(peak, forward.live + forward.peak + (beside if forward.beside else 0))
    for walk in _unlike(moments.walks):
        own = call_peaks(walk.call, keeps[walk.network], growing=walk.growing, from_forward=False)
        peak = max(peak, walk.live + max(own.forward, own.backward))
    return peak


def extra_of(moments: Moments, keeps: Sequence[Keeps], last: Keeps | None, device: Device) -> int:
    """Nanoseconds of everything that runs again."""
    total = sum(
        device.nanoseconds(walk.call.forward) + _extra(walk.call, keeps[walk.network], device)
        for walk in moments.walks
    )
    if moments.kept is not None and last is not None:
        total += _extra(moments.kept.walk.call, last, device)
    return total


def choose(
    moments: Moments, blocks: Sequence[int], budget: int, device: Device, uniform: Sequence[str] = (ALL, NOTHING)
) -> tuple[Choice | None, int]:
    """The fastest choice within the budget, and the least budget that some choice is known to meet.

    Args:
        moments: of a chain that keeps its last call's graph, or of one that does not.
        blocks: number of blocks of each network.
        budget: bytes above what is resident.
        device: of which the times are.
        uniform: keep-sets that are tried for all blocks alike, beside the solver's choice.
    """
    found: list[Choice] = []
    least: list[int] = []
    solved, needed = _solved(moments, blocks, budget, device)
    least.append(needed)
    candidates = [] if solved is None else [solved]
    for keep in uniform:
        keeps = tuple((keep,) * count for count in blocks)
        last = None if moments.kept is None else keeps[moments.kept.walk.network]
        candidates.append((keeps, last))
    for keeps, last in candidates:
        peak = peak_of(moments, keeps, last)
        least.append(peak)
        if peak <= budget:
            found.append(Choice(keeps, last, peak, extra_of(moments, keeps, last, device)))
    return min(found, key=lambda choice: (choice.extra_ns, choice.peak), default=None), min(least)


def _solved(
    moments: Moments, blocks: Sequence[int], budget: int, device: Device
) -> tuple[tuple[tuple[Keeps, ...], Keeps | None] | None, int]:
    """Keep-sets by the solver, or None; and a budget that it can meet."""
    keeps: list[Keeps] = []
    needed, fits = max(moments.peak, *(f.live + f.peak for f in moments.forwards), 0), True
    last: Keeps | None = None
    for network, count in enumerate(blocks):
        walks = [walk for walk in moments.walks if walk.network == network]
        if not walks:
            keeps.append((ALL,) * count)
            continue
        chain = _Chain(walks, device)
        made, least = chain.solve(budget)
        needed, fits = max(needed, least), fits and made is not None
        keeps.append(made or (NOTHING,) * count)
    if moments.kept is not None:
        chain = _Chain([moments.kept.walk], device, moments)
        last, least = chain.solve(budget)
        needed, fits = max(needed, least), fits and last is not None
    return ((tuple(keeps), last) if fits and needed <= max(budget, needed) else None), needed


class _Chain:
    """The blocks of one call as the solver takes them; of walks that differ, each mode at its worst."""

    def __init__(self, walks: Sequence[Walk], device: Device, moments: Moments | None = None) -> None:
        kept = None if moments is None else moments.kept
        lives = [walk.live for walk in walks] + ([] if kept is None else [kept.live])
        self.base = min(lives)
        unlike = _unlike(walks)
        counts = [sum(w.call is walk.call for w in walks) for walk in unlike]
        seen: set[int] = set()
        times = [0 if id(w.call) in seen or seen.add(id(w.call)) else n for w, n in zip(unlike, counts, strict=True)]  # type: ignore[func-returns-value]
        forward_bases = [walk.live - self.base if kept is None else kept.live - self.base for walk in unlike]
        self.blocks: list[list[Mode]] = []
        self.names: list[list[str] | None] = []
        for place, piece in enumerate(unlike[0].call.pieces):
            names = [cost.keep for cost in piece.costs]
            modes = []
            for name in names:
                costs: list[BlockCost] = [walk.call.pieces[place].cost(name) for walk in unlike]
                most = max(cost.kept for cost in costs)
                transient = max(
                    (c.backward_growing if w.growing else c.backward)
                    + (c.stays if kept is not None else 0)
                    + w.live
                    - self.base
                    for c, w in zip(costs, unlike, strict=True)
                )
                forward = max(c.forward_peak + b for c, b in zip(costs, forward_bases, strict=True))
                extra = sum(device.nanoseconds(c.walked) * n for c, n in zip(costs, times, strict=True))
                modes.append(Mode(most, max(most, forward), max(0, transient), extra))
            fastest = min(mode.extra_ns for mode in modes)
            modes = [Mode(m.kept, m.forward_peak, m.backward_transient, m.extra_ns - fastest) for m in modes]
            self.blocks.append(modes)
            self.names.append(None if piece.block is None else names)
        if moments is not None:
            beside = [f.live + f.peak - self.base for f in moments.forwards if f.beside]
            self.blocks.append([Mode(0, max(0, moments.peak_beside - self.base, *beside), 0, 0)])
            self.names.append(None)

    def solve(self, budget: int) -> tuple[Keeps | None, int]:
        """The keep-sets, or None; and the least budget."""
        try:
            plan = solve_chain(self.blocks, max(0, budget - self.base))
        except InfeasibleBudget as error:
            return None, error.least_bytes + self.base
        if plan.peak_bytes + self.base > budget:
            return None, plan.peak_bytes + self.base
        chosen = zip(plan.choice, self.names, strict=True)
        return tuple(names[mode] for mode, names in chosen if names is not None), plan.peak_bytes + self.base


def _unlike(walks: Sequence[Walk]) -> list[Walk]:
    """Of walks that cost the same the one beside which most lives."""
    most: dict[tuple[int, int, bool], Walk] = {}
    for walk in walks:
        key = (walk.network, id(walk.call), walk.growing)
        if key not in most or most[key].live < walk.live:
            most[key] = walk
    return list(most.values())


def _extra(call: CallCost, keeps: Keeps, device: Device) -> int:
    total = 0
    for piece in call.pieces:
        if piece.block is not None:
            fastest = min(device.nanoseconds(cost.walked) for cost in piece.costs)
            total += device.nanoseconds(piece.cost(keeps[piece.block]).walked) - fastest
    return total
