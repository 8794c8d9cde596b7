"""Bytes and nanoseconds of one training iteration from the costs of its calls, and the fastest plan within a budget.

An iteration is a rollout, the differentiated calls in reverse, and between the two the reward. Recomputed calls share
one keep-set per block. There are two ways to order it: the last differentiated call keeps its graph from the rollout
on, which saves one forward, with keep-sets of its own, and the reward then runs beside what that graph keeps; or the
call is recomputed like the others, and the reward has the memory to itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from prfl_fast.memory.block_cost import BlockCost
from prfl_fast.memory.call_cost import CallCost, Piece
from prfl_fast.memory.keeps import ALL
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
        beside: calls without a backward come after the last one that has one.
    """

    call: CallCost
    reward: CallCost | None
    calls: int
    differentiated: int
    held: Mapping[str, int]
    beside: bool = False

    @property
    def held_bytes(self) -> int:
        """All that lives throughout."""
        return sum(self.held.values())


@dataclass(frozen=True)
class Link:
    """A chain of blocks for the solver. ``owners[i]``: the piece and whose it is, ``"calls"``, ``"last"`` or
    ``"reward"``; None for what has no choice."""

    owners: tuple[tuple[Piece, str] | None, ...]
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
        keeps: keep-set of each block of a recomputed call, or of the last one where there is no other.
        last_keeps: the same of the last call where its graph is kept.
        reward_keeps: of each block of the reward.
        peak_bytes: what is held throughout included.
        total_ns: of the whole iteration.
        extra_ns: of that what runs again.
        costs: of each block under ``keeps``.
    """

    keep_last_call: bool
    keeps: tuple[str, ...]
    last_keeps: tuple[str, ...] | None
    reward_keeps: tuple[str, ...]
    peak_bytes: int
    total_ns: int
    extra_ns: int
    costs: tuple[BlockCost, ...]


def optimal(link: Link, room: int) -> tuple[int, ...]:
    """The planner's choice."""
    return solve_chain(link.modes, room).choice


def same_for_all(keep: str) -> Choose:
    """One keep-set for all blocks (where a block has it; else the one that keeps as much)."""

    def choose(link: Link, room: int) -> tuple[int, ...]:
        choice = tuple(
            0 if owner is None or owner[0].block is None else owner[0].costs.index(owner[0].cost(keep))
            for owner in link.owners
        )
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
    plain = Link((None,), [[Mode(0, call.plain_peak, 0, 0)]])
    scored = Link((), [])
    if reward is not None:
        fixed += device.nanoseconds(reward.forward) + sum(_least_walk(piece, device) for piece in reward.pieces)
        scored = _link(reward.pieces, "reward", device)
    if times == 0:
        return [Way(False, (plain, *([scored] if scored.modes else [])), fixed)]
    fixed += times * sum(_least_walk(piece, device) for piece in call.pieces)
    last = _link(call.pieces, "last", device, stays=True)
    # Later calls without a backward end before the reward begins.
    after = [last, *([plain] if iteration.beside else []), scored]
    kept = Link(tuple(o for link in after for o in link.owners), [m for link in after for m in link.modes])
    others = (_link(call.pieces, "calls", device, times - 1),) if times > 1 else ()
    apart = (_link(call.pieces, "calls", device, times), *([scored] if scored.modes else []))
    return [
        Way(True, (plain, *others, kept), fixed + (times - 1) * forward),
        Way(False, (plain, *apart), fixed + times * forward),
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
            found.append(_solve(iteration, way, room, device, choose))
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


def _solve(iteration: Iteration, way: Way, room: int, device: Device, choose: Choose) -> Outcome:
    """One way; the least bytes of all its links, where some don't fit."""
    choices: list[tuple[int, ...]] = []
    lacking: list[int] = []
    for link in way.links:
        try:
            choices.append(choose(link, max(0, room)))
        except InfeasibleBudget as error:
            lacking.append(error.least_bytes)
    if lacking or room < 0:
        raise InfeasibleBudget(max(0, room), max(lacking, default=0))
    extra = peak = 0
    chosen: dict[str, list[BlockCost]] = {"calls": [], "last": [], "reward": []}
    for link, choice in zip(way.links, choices, strict=True):
        peak = max(peak, peak_of(link.modes, choice))
        extra += sum(block[mode].extra_ns for block, mode in zip(link.modes, choice, strict=True))
        for owner, mode in zip(link.owners, choice, strict=True):
            if owner is not None and owner[0].block is not None:
                chosen[owner[1]].append(owner[0].costs[mode])
    keeps = {whose: tuple(cost.keep for cost in costs) for whose, costs in chosen.items()}
    again = (iteration.differentiated - way.keep_last_call) if iteration.differentiated else 0
    return Outcome(
        keep_last_call=way.keep_last_call,
        keeps=keeps["calls"] or keeps["last"],
        last_keeps=keeps["last"] if way.keep_last_call else None,
        reward_keeps=keeps["reward"],
        peak_bytes=iteration.held_bytes + peak,
        total_ns=way.fixed_ns + extra,
        extra_ns=extra + again * device.nanoseconds(iteration.call.forward),
        costs=tuple(chosen["calls"] or chosen["last"]),
    )


def _least_walk(piece: Piece, device: Device) -> int:
    return min(device.nanoseconds(cost.walked) for cost in piece.costs)


def _link(pieces: Sequence[Piece], whose: str, device: Device, times: int = 1, *, stays: bool = False) -> Link:
    """The pieces of a call that is walked so many times; ``stays``: its graph is kept from its forward on."""
    return Link(
        tuple((piece, whose) for piece in pieces),
        [
            [
                Mode(
                    cost.kept,
                    max(cost.kept, cost.forward_peak),
                    cost.backward + (cost.stays if stays else 0),
                    times * (device.nanoseconds(cost.walked) - _least_walk(piece, device)),
                )
                for cost in piece.costs
            ]
            for piece in pieces
        ],
    )
