"""The plan of a whole training iteration: what it holds, what each block keeps, and how long a device would take."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from itertools import groupby
from typing import Any

from prfl_fast.memory.plan import MemoryPlan


@dataclass(frozen=True)
class CurvePoint:
    """A budget, the peak of the plan for it, and the time of the iteration under that plan."""

    budget_bytes: int
    peak_bytes: int
    total_ns: int


@dataclass(frozen=True)
class IterationPlan(MemoryPlan):
    """A :class:`MemoryPlan` with the iteration that it was made for; printable, ``from_json(plan.to_json()) == plan``.

    Attributes:
        model, latents_shape: of the network.
        device: whose rates the times are estimated from.
        calls, differentiated_calls: of the network, in one iteration.
        held: bytes on each GPU that live throughout, by name.
        reward_keeps: keep-set of each block of the reward.
        total_ns: the iteration under this plan; of the reward its forward and backward are in it, of the optimiser and
            of communication between GPUs nothing is.
        recompute_all_ns: the same where every block is recomputed; None: that does not fit.
        least_bytes: the smallest budget that some plan meets.
        most_bytes: from this budget on nothing is recomputed inside a call.
        curve: other budgets.
    """

    model: str = ""
    latents_shape: tuple[int, ...] = ()
    device: str = ""
    gpus: int = 1
    calls: int = 0
    differentiated_calls: int = 0
    held: tuple[tuple[str, int], ...] = ()
    reward_keeps: tuple[str, ...] = ()
    total_ns: int = 0
    recompute_all_ns: int | None = None
    least_bytes: int = 0
    most_bytes: int = 0
    curve: tuple[CurvePoint, ...] = ()

    def __str__(self) -> str:
        on = f", on each of {self.gpus} GPUs" if self.gpus > 1 else ""
        graph = "recomputed as the others are"
        if self.keep_last_call:
            graph = f"kept while the reward runs ({_runs(self.last_keeps or ())})"
        reward = f"; the reward's blocks keep: {_runs(self.reward_keeps)}" if self.reward_keeps else ""
        return "\n".join(
            (
                f"{self.model}: latents {' x '.join(map(str, self.latents_shape))}, {self.calls} network calls, "
                f"{self.differentiated_calls} of them with a backward{on}",
                f"budget {gib(self.budget_bytes or 0)}, predicted peak {gib(self.predicted_peak_bytes or 0)}; "
                f"the least that would do is {gib(self.least_bytes)}, and from {gib(self.most_bytes)} on no block is "
                "recomputed",
                "",
                *_table([("held throughout", "bytes"), *self._held_rows()]),
                "",
                *_table([("blocks", "keep beside their input", "bytes", "run again"), *self._block_rows()]),
                "",
                f"the last call's graph is {graph}{reward}",
                f"one iteration: {seconds(self.total_ns)}, {seconds(self.extra_ns or 0)} of it what runs again"
                f"{self._against()}",
                f"Times are estimates for {self.device}, not measurements ({self.times_from}).",
            )
        )

    def _held_rows(self) -> list[tuple[str, ...]]:
        rows = [(name, gib(count)) for name, count in self.held]
        return [*rows, ("together", gib(sum(count for _, count in self.held)))]

    def _block_rows(self) -> list[tuple[str, ...]]:
        rows = []
        for _, group in groupby(
            self.blocks, key=lambda b: (b.name.rpartition(".")[0], b.keep, b.kept_bytes, b.extra_ns)
        ):
            some = list(group)
            first, last = some[0].name, some[-1].name
            name = first if len(some) == 1 else f"{first} .. {last.rpartition('.')[2]}"
            rows.append((name, some[0].keep, gib(some[0].kept_bytes), seconds(some[0].extra_ns)))
        total = (gib(sum(b.kept_bytes for b in self.blocks)), seconds(sum(b.extra_ns for b in self.blocks)))
        return [*rows, ("together", "", *total)]

    def _against(self) -> str:
        if self.recompute_all_ns is None:
            return "; recomputing every block does not fit"
        share = 1 - self.total_ns / self.recompute_all_ns
        return f"; recomputing every block {seconds(self.recompute_all_ns)}, so {share:.1%} less"

    @classmethod
    def from_json(cls, text: str) -> IterationPlan:
        """The plan of :meth:`to_json`. Raises ValueError for text that holds another thing."""
        own = {field.name for field in fields(cls)} - {field.name for field in fields(MemoryPlan)}
        try:
            read = json.loads(text)
            mine: dict[str, Any] = {name: read.pop(name) for name in own}
            base = MemoryPlan.from_json(json.dumps(read))
            mine["latents_shape"] = tuple(mine["latents_shape"])
            mine["held"] = tuple((name, count) for name, count in mine["held"])
            mine["reward_keeps"] = tuple(mine["reward_keeps"])
            mine["curve"] = tuple(CurvePoint(**point) for point in mine["curve"])
            return cls(**{field.name: getattr(base, field.name) for field in fields(base)}, **mine)
        except (ValueError, TypeError, AttributeError, KeyError) as error:
            raise ValueError(f"text: expected the JSON of an iteration's plan, got {text[:80]!r} ({error})") from error

    def to_json(self) -> str:
        """The plan as JSON text."""
        return json.dumps(asdict(self))


def gib(count: int) -> str:
    """Bytes for people."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**27 else f"{count / 2**20:.2f} MiB"


def seconds(nanoseconds: int) -> str:
    """Nanoseconds for people."""
    value = nanoseconds / 1e9
    if value < 1:
        return f"{1000 * value:.3g} ms"
    return f"{value:.1f} s" if value < 120 else f"{value / 60:.1f} min"


def _table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Rows of equal width; words to the left, the columns from ``bytes`` on to the right."""
    first = rows[0].index("bytes")
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            text.rjust(width) if column >= first else text.ljust(width)
            for column, (text, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _runs(keeps: Sequence[str]) -> str:
    return ", ".join(f"{len(list(group))} x {keep}" for keep, group in groupby(keeps))
