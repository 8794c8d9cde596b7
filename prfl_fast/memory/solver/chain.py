"""The planner's door: a chain of blocks, the ways to run each, a byte budget; out comes the fastest plan that fits."""

from __future__ import annotations

import importlib
import math
import operator
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, fields
from fractions import Fraction
from functools import cache
from typing import Any

from prfl_fast.memory.plan import InfeasibleBudget
from prfl_fast.memory.solver import twin
from prfl_fast.memory.solver.problem import LARGEST, Chain, Limits, Solution, Step

_LIMITS = Limits()
_TWIN_LIMITS = Limits(fine_labels=5_000_000)  # Python is so much slower
_BILLION = 10**9


@dataclass(frozen=True)
class Mode:
    """One way to run a block. Whole bytes and whole nanoseconds, none negative.

    A block's input belongs to it. What earlier blocks keep is not counted here.

    Attributes:
        kept: device bytes held from the end of the block's forward to the end of its backward.
        forward_peak: device bytes at the forward's peak; at least ``kept + offloaded``, both of which exist at its end.
        backward_transient: device bytes on top of ``kept`` at the backward's peak: recomputed tensors, gradients,
            workspace, and the offloaded bytes, which are back by then; so at least ``offloaded``.
        extra_ns: time that this mode adds to the fastest run of the block, recomputation for example.
        offloaded: bytes that leave for pinned host memory while the next block's forward runs, and that come back while
            the next block's backward runs.
        forward_ns: the block's forward, which hides the copy out of the block before it.
        backward_ns: the block's backward, without ``extra_ns``; both hide the copy in of the block before it.
    """

    kept: int
    forward_peak: int
    backward_transient: int
    extra_ns: int
    offloaded: int = 0
    forward_ns: int = 0
    backward_ns: int = 0

    def __post_init__(self) -> None:
        for field in fields(self):
            object.__setattr__(self, field.name, _whole(field.name, getattr(self, field.name)))
        if self.forward_peak < self.kept + self.offloaded:
            raise ValueError(
                f"forward_peak: expected at least kept + offloaded ({self.kept + self.offloaded}), for both exist at "
                f"the end of the forward, got {self.forward_peak}"
            )
        if self.backward_transient < self.offloaded:
            raise ValueError(
                f"backward_transient: expected at least offloaded ({self.offloaded}), which is back on the device for "
                f"the backward, got {self.backward_transient}"
            )


@dataclass(frozen=True)
class ChainPlan:
    """The plan of :func:`solve_chain`.

    Attributes:
        choice: index of the chosen mode in each block.
        extra_ns: time added to the whole chain: the modes' own and the stalls of copies that nothing hides.
        peak_bytes: the largest number of device bytes held at once.
        optimal: proved: no plan within the budget adds less.
        gap: certified: no plan within the budget adds less than ``(1 - gap) * extra_ns``; 0 when optimal.
        bound_ns: the same as an exact integer.
        offloaded_bytes: host bytes in use at the end of the forward.
    """

    choice: tuple[int, ...]
    extra_ns: int
    peak_bytes: int
    optimal: bool
    gap: float
    bound_ns: int
    offloaded_bytes: int


def solve_chain(
    blocks: Sequence[Sequence[Mode]],
    budget_bytes: int,
    *,
    host_bytes: int = 0,
    bytes_per_second: float | None = None,
) -> ChainPlan:
    """Chooses one mode per block so that the chain stays within a budget and the added time is least.

    The forward runs the blocks in order, the backward in reverse. With ``K_i`` the sum of ``kept`` up to block i, ``o``
    the offloaded bytes and ``c = ceil(o / bytes_per_second)`` the time of one copy in ns, a plan needs

        max over i of  K_{i-1} + o_{i-1} + max(forward_peak_i, kept_i + backward_transient_i)

    device bytes, and adds

        sum over i of  extra_i + max(0, c_{i-1} - forward_i) + max(0, c_{i-1} - backward_i - extra_i)

    nanoseconds, plus ``2 c`` of the last block, whose copies nothing hides. (A barrier stands after every block: a copy
    belongs to one neighbour's time.) Integers throughout: a plan that is given never exceeds the budget.

    Deterministic: the search stops after a count of operations, never after a time. For some tens of blocks that is
    under a second of the compiled core, which lets other Python threads run (an interrupt is seen when it ends). Chains
    that occur in practice are solved to proved optimality; a hard one comes with its certified gap, and is never slower
    than any single mode for all blocks nor than greedy (from the leanest modes on, the change of one block that saves
    most time per further byte, as long as one fits).

    Args:
        blocks: the ways to run each block, in the order of the forward. Stem and head are blocks too.
        budget_bytes: device bytes for what the modes count; weights and the like are subtracted by the caller.
        host_bytes: pinned host memory for offloaded bytes; 0: modes that offload are left out.
        bytes_per_second: rate of the host link in one direction; needed where modes that offload may be used.

    Raises:
        InfeasibleBudget: no plan stays within the budget. Its ``least_bytes`` is a budget that some plan meets,
            ``least_choice`` that plan; ``exact``: no plan meets a smaller one (False only with a host that can't hold
            all and with very many different sizes, and the message says so).
        TypeError, ValueError: an argument is wrong; the message begins with its name.
    """
    budget = _whole("budget_bytes", budget_bytes)
    host = _whole("host_bytes", host_bytes)
    rate = None if bytes_per_second is None else _rate(bytes_per_second)
    _check_blocks(blocks)
    chain, original = _normalised(blocks, host, rate)
    # More than any plan needs is as good as that, and fits 64 bits.
    most_host = sum(max(step.offloaded for step in block) for block in chain)
    solution = _solve(chain, min(budget, LARGEST), min(host, most_host), _one_mode_for_all(original))
    if not solution.found:
        raise InfeasibleBudget(
            budget,
            solution.least,
            argument="budget_bytes",
            least_choice=tuple(original[i][mode] for i, mode in enumerate(solution.least_choice)),
            exact=solution.least_exact,
        )
    choice = solution.choice
    bound = min(solution.bound, solution.extra)
    return ChainPlan(
        choice=tuple(original[i][mode] for i, mode in enumerate(choice)),
        extra_ns=solution.extra,
        peak_bytes=_peak(chain, choice),
        optimal=bound == solution.extra,
        gap=float(Fraction(solution.extra - bound, max(1, solution.extra))),
        bound_ns=bound,
        offloaded_bytes=sum(block[mode].offloaded for block, mode in zip(chain, choice, strict=True)),
    )


def missing_core() -> str | None:
    """Why the compiled core can't be loaded and the same in Python runs instead; None: it is there."""
    return _load()[1]


def _solve(chain: Chain, budget: int, host: int, seeds: list[list[int]]) -> Solution:
    native = _native()
    if native is None:
        return twin.solve(chain, budget, host, _TWIN_LIMITS, seeds)
    return Solution(*native.solve_chain(chain, budget, host, _LIMITS, seeds))


@cache
def _load() -> tuple[Any, str | None]:
    try:
        return importlib.import_module("prfl_fast._native"), None
    except ImportError as error:
        return None, str(error)


@cache
def _native() -> Any:
    """The compiled core, or None where it is not there; that is announced, and once, for the result is cached."""
    native, reason = _load()
    if reason is not None:
        # stacklevel 1: a warning of this package, which `prfl-fast doctor` collects.
        warnings.warn(
            f"prfl_fast: its compiled planner is not there ({reason}); the same in Python runs instead: slower, and on "
            "hard chains with larger gaps",
            stacklevel=1,
        )
    return native


def _one_mode_for_all(original: list[list[int]]) -> list[list[int]]:
    """For every mode that all blocks may use, its index in each block."""
    common = set.intersection(*map(set, original))
    return [[usable.index(mode) for usable in original] for mode in sorted(common)]


def _normalised(blocks: Sequence[Sequence[Mode]], host: int, rate: Fraction | None) -> tuple[Chain, list[list[int]]]:
    """Steps of the modes that the host can hold, and the index of each in its block."""
    if rate is None and host > 0 and any(mode.offloaded for block in blocks for mode in block):
        raise ValueError("bytes_per_second: expected the rate of the host link, for some modes offload; got None")
    chain: Chain = []
    original = []
    sums = [0, 0, 0]
    least_offloaded = 0
    for block in blocks:
        usable = [m for m, mode in enumerate(block) if mode.offloaded <= host]
        if usable:
            least_offloaded += min(block[m].offloaded for m in usable)
        if not usable or least_offloaded > host:
            least = sum(min(mode.offloaded for mode in other) for other in blocks)
            raise ValueError(f"host_bytes: expected at least {least}, for no plan offloads less, got {host}")
        steps = [_step(block[m], rate) for m in usable]
        for index, largest in enumerate(
            (
                max(step.peak + step.offloaded for step in steps),
                max(step.extra + 2 * step.copy for step in steps),
                max(max(step.forward, step.backward) for step in steps),
            )
        ):
            sums[index] += largest
        chain.append(steps)
        original.append(usable)
    for total, what in zip(sums, ("bytes", "nanoseconds added", "nanoseconds of compute"), strict=True):
        if total >= LARGEST:
            raise ValueError(f"blocks: expected less than 2^59 {what} in the whole chain, got up to {total}")
    return chain, original


def _step(mode: Mode, rate: Fraction | None) -> Step:
    copy = 0 if rate is None else math.ceil(mode.offloaded * _BILLION / rate)
    return Step(
        mode.kept,
        max(mode.forward_peak, mode.kept + mode.backward_transient),
        mode.extra_ns,
        mode.offloaded,
        copy,
        mode.forward_ns,
        mode.backward_ns + mode.extra_ns,
    )


def _peak(chain: Chain, choice: Sequence[int]) -> int:
    peak = kept = copied = 0
    for block, mode in zip(chain, choice, strict=True):
        peak = max(peak, kept + copied + block[mode].peak)
        kept += block[mode].kept
        copied = block[mode].offloaded
    return peak


def _check_blocks(blocks: Any) -> None:
    if not isinstance(blocks, Sequence) or isinstance(blocks, (str, bytes)):
        raise TypeError(f"blocks: expected a sequence of blocks, got {type(blocks).__name__}")
    if not blocks:
        raise ValueError("blocks: expected at least one block, got none")
    for i, block in enumerate(blocks):
        if not isinstance(block, Sequence) or isinstance(block, (str, bytes)):
            raise TypeError(f"blocks[{i}]: expected a sequence of Mode, got {type(block).__name__}")
        if not block:
            raise ValueError(f"blocks[{i}]: expected at least one Mode, got none")
        for m, mode in enumerate(block):
            if not isinstance(mode, Mode):
                raise TypeError(f"blocks[{i}][{m}]: expected a Mode, got {type(mode).__name__}")


def _whole(name: str, value: Any) -> int:
    if isinstance(value, bool) or not hasattr(type(value), "__index__"):
        raise TypeError(f"{name}: expected a whole number, got {value!r}")
    number = operator.index(value)
    if number < 0:
        raise ValueError(f"{name}: expected 0 or more, got {number}")
    return number


def _rate(value: Any) -> Fraction:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"bytes_per_second: expected a number, got {value!r}")
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"bytes_per_second: expected a finite number above 0, got {value!r}")
    return Fraction(value)
