"""The memory plan: what a network call of the chain keeps for its backward and what it recomputes."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

from prfl_fast.memory.keeps import parse_keep

_RECOMPUTE = ("call", "blocks", "planned")
_WORDS = {
    "call": "whole calls recomputed",
    "blocks": "whole calls recomputed, and each block inside them",
    "planned": "whole calls recomputed, and inside them what each block does not keep",
}


class InfeasibleBudget(ValueError):
    """No plan stays below the budget; ``least_bytes`` is the smallest budget that some plan meets.

    Attributes:
        budget_bytes, least_bytes: exact.
        alternatives: of a whole sample: the ways that were looked at.
        least_choice: of a chain of blocks: the modes that need the least bytes.
        exact: False: ``least_bytes`` is the least that was found, and a smaller one was not ruled out.
    """

    def __init__(
        self,
        budget_bytes: int,
        least_bytes: int,
        alternatives: tuple[Alternative, ...] = (),
        argument: str = "memory_budget",
        least_choice: tuple[int, ...] = (),
        exact: bool = True,
    ) -> None:
        least = "the least that would do is" if exact else "the least that was found to do is"
        advice = "latents, batch or the number of trainable parameters" if argument == "memory_budget" else "the blocks"
        super().__init__(
            f"{argument}: {_exactly(budget_bytes)} can't hold the chain; {least} {_exactly(least_bytes)}. Raise the "
            f"budget, or make {advice} smaller."
        )
        self.budget_bytes = budget_bytes
        self.least_bytes = least_bytes
        self.alternatives = alternatives
        self.argument = argument
        self.least_choice = least_choice
        self.exact = exact

    def __reduce__(self) -> tuple[Any, ...]:
        told = (self.budget_bytes, self.least_bytes, self.alternatives, self.argument, self.least_choice, self.exact)
        return type(self), told


@dataclass(frozen=True)
class Alternative:
    """One way to run the chain and the peak that is predicted for it."""

    recompute: str
    keep_last_call: bool
    peak_bytes: int

    def __post_init__(self) -> None:
        _check_way(self.recompute, self.keep_last_call)
        _check_bytes("peak_bytes", self.peak_bytes)


@dataclass(frozen=True)
class PlannedBlock:
    """One row of a plan's table: what a block keeps in a recomputed call, and what that costs.

    Attributes:
        name: of the block, ``"2: "`` before it where it is one of a second network.
        keep: its keep-set (:mod:`prfl_fast.memory.keeps`).
        kept_bytes: from its forward to its backward.
        extra_ns: time of its recomputation, in one call.
    """

    name: str
    keep: str
    kept_bytes: int
    extra_ns: int


@dataclass(frozen=True)
class MemoryPlan:
    """How the chain is recomputed; printable, and ``from_json(plan.to_json())`` is the same plan.

    Attributes:
        recompute: ``"call"``: a network call keeps its input, and runs again as a whole in the backward; ``"blocks"``:
            moreover every block of the running call keeps its input only, and runs once more; ``"planned"``: each block
            keeps what ``keeps`` says.
        keep_last_call: the last differentiated call keeps its graph, since its backward comes first anyway.
        budget_bytes: the budget it was chosen for; None: chosen without one.
        predicted_peak_bytes: weights, gradients, latents and graphs at their peak; None without a budget.
        alternatives: every way that was looked at, fastest first, with its predicted peak.
        keeps: keep-set of each block, one row a network; for ``"planned"`` only.
        last_keeps: the same for the last call, of one network, where its graph is kept; None: as ``keeps`` says.
        blocks: the table of recomputed calls.
        extra_ns: time of everything that runs again in the whole chain.
        times_from: where the times are from.
    """

    recompute: str = "call"
    keep_last_call: bool = True
    budget_bytes: int | None = None
    predicted_peak_bytes: int | None = None
    alternatives: tuple[Alternative, ...] = ()
    keeps: tuple[tuple[str, ...], ...] = ()
    last_keeps: tuple[str, ...] | None = None
    blocks: tuple[PlannedBlock, ...] = ()
    extra_ns: int | None = None
    times_from: str | None = None

    def __post_init__(self) -> None:
        _check_way(self.recompute, self.keep_last_call)
        for name in ("budget_bytes", "predicted_peak_bytes"):
            value = getattr(self, name)
            if value is not None:
                _check_bytes(name, value)
        if (self.recompute == "planned") != bool(self.keeps):
            raise ValueError(f"keeps: expected some for recompute='planned' and none otherwise, got {self.keeps!r}")
        for keep in {keep for row in (*self.keeps, self.last_keeps or ()) for keep in row}:
            parse_keep(keep)

    def keeps_of(self, network: int, count: int, *, last: bool) -> tuple[str, ...]:
        """Keep-set of each of the ``count`` blocks of a network; ``last``: in the call whose graph is kept.

        Raises:
            ValueError: the plan was made for another network.
        """
        if self.recompute != "planned":
            return ("all" if self.recompute == "call" else "nothing",) * count
        row = self.last_keeps if last and self.last_keeps is not None else None
        if row is None:
            row = self.keeps[network] if network < len(self.keeps) else ()
        if len(row) != count:
            raise ValueError(f"plan: expected one for a network of {count} blocks, got one for {len(row)}")
        return row

    def __str__(self) -> str:
        last = "kept" if self.keep_last_call else "recomputed too"
        lines = [f"{_WORDS[self.recompute]}; the last call's graph is {last}"]
        if self.budget_bytes is not None:
            lines[0] += f"; budget {_size(self.budget_bytes)}"
        if self.predicted_peak_bytes is not None:
            lines[0] += f", predicted peak {_size(self.predicted_peak_bytes)}"
        for way in self.alternatives:
            name = f"{way.recompute}, last call {'kept' if way.keep_last_call else 'recomputed'}"
            lines.append(f"  {name:<32}{_size(way.peak_bytes):>12}")
        lines += self._table()
        return "\n".join(lines)

    def _table(self) -> list[str]:
        """Blocks in a row that are planned alike make one line."""
        if self.recompute != "planned" or not self.blocks:
            return []
        lines = [f"  {'block':<28}{'kept':<44}{'bytes':>12}{'again, ms':>12}"]
        for _, same in groupby(self.blocks, key=lambda b: (b.keep, b.kept_bytes, b.extra_ns)):
            rows = list(same)
            name = rows[0].name if len(rows) == 1 else f"{rows[0].name} .. {rows[-1].name}"
            first = rows[0]
            lines.append(f"  {name:<28}{first.keep:<44}{_size(first.kept_bytes):>12}{first.extra_ns / 1e6:>12.3f}")
        total, time = sum(b.kept_bytes for b in self.blocks), sum(b.extra_ns for b in self.blocks)
        lines.append(f"  {'in all':<72}{_size(total):>12}{time / 1e6:>12.3f}")
        if self.last_keeps is not None:
            lines.append(f"  the last call, kept: {', '.join(sorted(set(self.last_keeps)))}")
        if self.times_from is not None:
            lines.append(f"  times: {self.times_from}")
        return lines

    def compared(self, measured_bytes: int) -> str:
        """One line: predicted against measured after a run."""
        _check_bytes("measured_bytes", measured_bytes)
        if self.predicted_peak_bytes is None:
            return f"measured {_size(measured_bytes)}; nothing was predicted"
        off = 100 * (self.predicted_peak_bytes / measured_bytes - 1) if measured_bytes else float("inf")
        return f"predicted {_size(self.predicted_peak_bytes)}, measured {_size(measured_bytes)} ({off:+.1f} %)"

    def to_json(self) -> str:
        """The plan as JSON text."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> MemoryPlan:
        """The plan of :meth:`to_json`. Raises ValueError for text that holds another thing."""
        try:
            fields = json.loads(text)
            ways = tuple(Alternative(**way) for way in fields.pop("alternatives"))
            for name in ("keeps", "last_keeps"):
                if fields.get(name) is not None:
                    fields[name] = tuple(tuple(row) if isinstance(row, list) else row for row in fields[name])
            fields["blocks"] = tuple(PlannedBlock(**row) for row in fields.get("blocks", ()))
            return cls(**fields, alternatives=ways)
        except (ValueError, TypeError, AttributeError, KeyError) as error:
            raise ValueError(f"text: expected the JSON of a memory plan, got {text[:80]!r} ({error})") from error


def choose_plan(budget_bytes: int | None, alternatives: Iterable[Alternative] = ()) -> MemoryPlan:
    """The fastest alternative that stays within the budget.

    Args:
        budget_bytes: None: whole-call recomputation with the last call's graph kept, whatever it needs.
        alternatives: fastest first; drawn one by one until one fits, so predictions may be made on demand.

    Raises:
        InfeasibleBudget: none fits.
    """
    if budget_bytes is None:
        return MemoryPlan()
    seen: list[Alternative] = []
    for way in alternatives:
        seen.append(way)
        if way.peak_bytes <= budget_bytes:
            return MemoryPlan(way.recompute, way.keep_last_call, budget_bytes, way.peak_bytes, tuple(seen))
    if not seen:
        raise ValueError("alternatives: expected at least one, got none")
    raise InfeasibleBudget(budget_bytes, min(way.peak_bytes for way in seen), tuple(seen))


def _check_way(recompute: object, keep_last_call: object) -> None:
    if recompute not in _RECOMPUTE:
        raise ValueError(f"recompute: expected one of {', '.join(map(repr, _RECOMPUTE))}, got {recompute!r}")
    if not isinstance(keep_last_call, bool):
        raise TypeError(f"keep_last_call: expected True or False, got {keep_last_call!r}")


def _check_bytes(name: str, count: object) -> None:
    if not isinstance(count, int) or isinstance(count, bool):
        raise TypeError(f"{name}: expected whole bytes, got {count!r}")


def _size(count: int) -> str:
    """Bytes for people: 1536 -> '1.50 KiB'."""
    value, unit = float(count), "bytes"
    for unit in ("bytes", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024 or unit == "TiB":
            break
        value /= 1024
    return f"{count} bytes" if unit == "bytes" else f"{value:.2f} {unit}"


def _exactly(count: int) -> str:
    return _size(count) if count < 1024 else f"{_size(count)} ({count} bytes)"
