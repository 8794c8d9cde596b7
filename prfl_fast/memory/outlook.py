"""Bytes and nanoseconds of one training iteration from the costs of its calls, and the fastest plan within a budget.

An iteration is a rollout, the differentiated calls in reverse, and between the two the reward. Its calls share one
keep-set per block. There are two ways to order it: the last differentiated call keeps its graph from the rollout on,
which saves one forward, and the reward then runs on top of what that graph keeps; or the call is recomputed like the
others, and the reward has the memory to itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from prfl_fast.memory.block_cost import BlockCost
from prfl_fast.memory.call_cost import CallCost, Piece
from prfl_fast.memory.keeps import ALL, NOTHING
from prfl_fast.memory.plan import InfeasibleBudget
from prfl_fast.memory.roofline import Device
from prfl_fast.memory.solver.chain import Mode, solve_chain

Chain = list[list[Mode]]
# Chooses a mode of each block of a chain within so many bytes; raises InfeasibleBudget where it finds none.
Choose = Callable[["Link", int], tuple[int, ...]]


@dataclass(frozen=True)
class Iteration:
    """What one iteration does.

    Attributes:
        call: a differentiated network call.
        reward: the reward's forward and backward; None: it is left out.
        calls: network calls of the rollout.
        differentiated: those of them that have a backward.
        held: bytes that live throughout, by name.
    """

    call: CallCost
    reward: CallCost | None
    calls: int
    differentiated: int
    held: Mapping[str, int]

    @property
    def held_bytes(self) -> int:
        """All that lives throughout."""
        return sum(self.held.values())


@dataclass(frozen=True)
class Link:
    """Pieces whose peaks add up, as a chain for the solver: ``owners[i]`` is the piece and the times it is walked."""

    owners: tuple[tuple[Piece, int], ...]
    modes: Chain


@dataclass(frozen=True)
class Way:
    """One order of the iteration: ``links`` are solved one by one under the same budget, ``fixed_ns`` is the rest."""

    keep_last_call: bool
    links: tuple[Link, ...]
    fixed_ns: int


@dataclass(frozen=True)
class Outcome:
    """A plan and what it costs.

    Attributes:
        keep_last_call: the last differentiated call keeps its graph while the reward runs.
        keeps: keep-set of each block of the network.
        reward_keeps: of each block of the reward.
        peak_bytes: what is held throughout included.
        total_ns: of the whole iteration.
        costs: of each piece of a call with these keep-sets, in the order of the forward.
    """

    keep_last_call: bool
    keeps: tuple[str, ...]
    reward_keeps: tuple[str, ...]
    peak_bytes: int
    total_ns: int
    costs: tuple[BlockCost, ...]


def optimal(link: Link, room: int) -> tuple[int, ...]:
    """The planner's choice."""
    return solve_chain(link.modes, room).choice


def same_for_all(keep: str) -> Choose:
    """One keep-set for all blocks (where a block has it; else the one that keeps as much)."""

    def choose(link: Link, room: int) -> tuple[int, ...]:
        choice = tuple(0 if piece.block is None else piece.costs.index(piece.cost(keep)) for piece, _ in link.owners)
        peak = peak_of(link.modes, choice)
        if peak > room:
            raise InfeasibleBudget(room, peak)
        return choice

    return choose


def peak_of(modes: Sequence[Sequence[Mode]], choice: Sequence[int]) -> int:
    """Peak of a chain under a choice."""
    kept = peak = 0
    for block, mode in zip(modes, choice, strict=True):
        chosen = block[mode]
        peak = max(peak, kept + chosen.forward_peak, kept + chosen.kept + chosen.backward_transient)
        kept += chosen.kept
    return peak


def ways(iteration: Iteration, device: Device) -> list[Way]:
    """Both orders of the iteration, or the only one where no call has a backward."""
    call, reward, times = iteration.call, iteration.reward, iteration.differentiated
    forward = device.nanoseconds(call.forward)
    fixed = iteration.calls * forward
    # The rollout itself: one block, nothing kept.
    rollout = Link((), [[Mode(0, call.plain_peak, 0, 0)]])
    reward_pieces = () if reward is None else tuple((piece, 1) for piece in reward.pieces)
    if reward is not None:
        fixed += device.nanoseconds(reward.forward) + sum(_least_walk(piece, device) for piece, _ in reward_pieces)
    if times == 0:
        return [Way(False, (rollout,), fixed)]
    pieces = tuple((piece, times) for piece in call.pieces)
    fixed += times * sum(_least_walk(piece, device) for piece, _ in pieces)
    kept = _link(pieces, device, stays=True, then=reward_pieces)
    apart = [_link(pieces, device)] + ([_link(reward_pieces, device)] if reward_pieces else [])
    return [
        Way(True, (rollout, kept), fixed + (times - 1) * forward),
        Way(False, (rollout, *apart), fixed + times * forward),
    ]


def plan_iteration(iteration: Iteration, budget_bytes: int, device: Device, choose: Choose = optimal) -> Outcome:
    """The faster of the two ways within the budget.

    Raises:
        InfeasibleBudget: neither fits; ``least_bytes`` would do.
    """
    room = budget_bytes - iteration.held_bytes
    found: list[Outcome] = []
    least: list[int] = []
    for way in ways(iteration, device):
        try:
            found.append(_solve(iteration, way, room, choose))
        except InfeasibleBudget as error:
            least.append(error.least_bytes + iteration.held_bytes)
    if not found:
        raise InfeasibleBudget(budget_bytes, min(least))
    return min(found, key=lambda outcome: outcome.total_ns)


def least_bytes(iteration: Iteration, device: Device, choose: Choose = optimal) -> int:
    """The smallest budget that some plan meets."""
    try:
        return plan_iteration(iteration, 0, device, choose).peak_bytes
    except InfeasibleBudget as error:
        return error.least_bytes


def most_bytes(iteration: Iteration, device: Device) -> int:
    """The budget from which on nothing is recomputed inside a call."""
    return least_bytes(iteration, device, same_for_all(ALL))


def _solve(iteration: Iteration, way: Way, room: int, choose: Choose) -> Outcome:
    """One way; the least bytes of all its links, where some don't fit."""
    choices: list[tuple[int, ...]] = []
    lacking: list[int] = []
    for link in way.links:
        try:
            choices.append(choose(link, max(0, room)) if link.owners else _only(link, room))
        except InfeasibleBudget as error:
            lacking.append(error.least_bytes)
    if lacking:
        raise InfeasibleBudget(max(0, room), max(lacking))
    extra = peak = 0
    chosen: list[tuple[Piece, BlockCost]] = []
    for link, choice in zip(way.links, choices, strict=True):
        peak = max(peak, peak_of(link.modes, choice))
        extra += sum(block[mode].extra_ns for block, mode in zip(link.modes, choice, strict=True))
        chosen += [(piece, piece.costs[mode]) for (piece, _), mode in zip(link.owners, choice, strict=False)]
    own = chosen[: len(iteration.call.pieces)]
    return Outcome(
        way.keep_last_call,
        tuple(cost.keep for piece, cost in own if piece.block is not None),
        tuple(cost.keep for piece, cost in chosen[len(own) :] if piece.block is not None),
        iteration.held_bytes + peak,
        way.fixed_ns + extra,
        tuple(cost for _, cost in own),
    )


def _only(link: Link, room: int) -> tuple[int, ...]:
    choice = (0,) * len(link.modes)
    peak = peak_of(link.modes, choice)
    if peak > room:
        raise InfeasibleBudget(max(0, room), peak)
    return choice


def _least_walk(piece: Piece, device: Device) -> int:
    return min(device.nanoseconds(cost.walked) for cost in piece.costs)


def _link(
    pieces: tuple[tuple[Piece, int], ...],
    device: Device,
    *,
    stays: bool = False,
    then: tuple[tuple[Piece, int], ...] = (),
) -> Link:
    return Link(
        (*pieces, *then),
        [_modes(piece, times, device, stays) for piece, times in pieces]
        + [_modes(piece, times, device, False) for piece, times in then],
    )


def _modes(piece: Piece, times: int, device: Device, stays: bool) -> list[Mode]:
    fastest = _least_walk(piece, device)
    return [
        Mode(
            cost.kept,
            max(cost.kept, cost.forward_peak),
            cost.backward + (cost.stays if stays else 0),
            times * (device.nanoseconds(cost.walked) - fastest),
        )
        for cost in piece.costs
    ]


__all__ = [
    "ALL",
    "NOTHING",
    "Iteration",
    "Link",
    "Outcome",
    "Way",
    "least_bytes",
    "most_bytes",
    "optimal",
    "peak_of",
    "plan_iteration",
    "same_for_all",
    "ways",
]
