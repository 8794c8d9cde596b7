"""What the planner core is given and gives back; the same fields, in the same order, as in csrc/native/planner.hpp."""

from __future__ import annotations

from typing import NamedTuple

NEVER = 1 << 61  # a cost that no plan has
LARGEST = 1 << 59  # sums over a chain stay below this, so that no sum of sums overflows 64 bits


class Step(NamedTuple):
    """One way to run a block, normalised. Bytes and nanoseconds.

    Attributes:
        kept: held on the device from the block's forward to the end of its backward.
        peak: largest need above what earlier blocks keep, in forward or backward; at least ``kept``.
        extra: added time.
        offloaded: bytes on the host between forward and backward.
        copy: time of one copy of ``offloaded``, one way; does not fall when ``offloaded`` rises.
        forward: compute that hides the previous block's copy out.
        backward: compute that hides the previous block's copy in, ``extra`` included.
    """

    kept: int
    peak: int
    extra: int
    offloaded: int
    copy: int
    forward: int
    backward: int


Chain = list[list[Step]]


class Limits(NamedTuple):
    """How much work a solve may do. Work is counted, never timed, so that a result does not depend on the machine.

    Attributes:
        coarse_work: cell updates of the first grids.
        coarse_labels: label expansions on them.
        middle_work, middle_labels: the same of the second grids.
        fine_work, fine_labels: the same of the third.
        cells: cells held by all grids of a round.
        labels: labels held by a search.
        candidates: labels held before dominated ones are dropped.
        points: points held by the fronts of the least peak.
    """

    coarse_work: int = 4_000_000
    coarse_labels: int = 300_000
    middle_work: int = 60_000_000
    middle_labels: int = 3_000_000
    fine_work: int = 300_000_000
    fine_labels: int = 50_000_000
    cells: int = 8_000_000
    labels: int = 3_000_000
    candidates: int = 1 << 17
    points: int = 1 << 20


class Solution(NamedTuple):
    """What the core found.

    Attributes:
        found: a plan within the budget.
        choice: mode of each block; empty without a plan.
        extra: total added time, stalls included.
        bound: no feasible plan adds less.
        least_choice: the plan of the least peak.
        least: its peak in bytes.
        least_exact: proved: no plan has a lower peak.
    """

    found: bool
    choice: list[int]
    extra: int
    bound: int
    least_choice: list[int]
    least: int
    least_exact: bool


class Node(NamedTuple):
    """The bytes of the block before that are being copied, and the time of one copy."""

    offloaded: int
    copy: int


class Best:
    """The best plan known, and the best bound."""

    def __init__(self) -> None:
        self.found = False
        self.choice: list[int] = []
        self.extra = 0
        self.bound = 0

    @property
    def proved(self) -> bool:
        """No plan is better."""
        return self.found and self.bound >= self.extra


def entered(node: Node, step: Step) -> int:
    """Added time of a mode that is entered from a node: its own, and the stalls of the copies before it."""
    return step.extra + max(0, node.copy - step.forward) + max(0, node.copy - step.backward)


def added_by(chain: Chain, choice: list[int]) -> int:
    """Added time of a plan, stalls included."""
    node, total = Node(0, 0), 0
    for block, mode in zip(chain, choice, strict=True):
        total += entered(node, block[mode])
        node = Node(block[mode].offloaded, block[mode].copy)
    return total + 2 * node.copy
