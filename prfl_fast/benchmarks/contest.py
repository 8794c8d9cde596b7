"""An op's backends beside its peers: right first, then timed, in one run at one number of bytes.

Errors are l2 norms: a rounding changes a term by at most eps / 2 of itself, element by element, and so its norm by at
most that share. ``error_over_tolerance`` is the largest, over results and gradients, of error over
``roundings * eps * scale``, with the wider eps of the tensor's dtype and of what was computed in; above 1, or with a
NaN anywhere, the contestant is wrong, and no time of it is reported.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from prfl_fast import ops
from prfl_fast.benchmarks.measure import copy_speed, measure
from prfl_fast.benchmarks.registry import Row, Setting
from prfl_fast.ops import backends

Forward = Callable[[], tuple[Tensor, ...]]

DIRECTIONS = ("forward", "backward")


class AbsentError(Exception):
    """A contestant that is not here; the message says why."""


@dataclass(frozen=True)
class Contestant:
    """One way to do the work.

    Attributes:
        name: of the backend or the peer.
        prepare: gives the forward; raises :class:`AbsentError` where it can't be had.
        roundings: on the longest way from an input to a gradient, both counted at ``computes_in``.
        computes_in: narrowest dtype of what it rounds to on the way.
        backend: name for :func:`prfl_fast.ops.backend`, for ours; None: a peer.
    """

    name: str
    prepare: Callable[[], Forward]
    roundings: float
    computes_in: torch.dtype = torch.float32
    backend: str | None = None


@dataclass(frozen=True)
class Contest:
    """One problem: the same tensors for every contestant.

    Attributes:
        labels: op, shape and dtype as the rows tell them.
        inputs: leaves that gradients are taken of.
        cotangents: one per result.
        expected: results, then gradients, in float64 and by another way than any contestant's where there is one.
        scales: l2 norm that errors of each of them are measured against.
        moved: bytes that cannot be avoided, by direction.
    """

    labels: dict[str, Any]
    device: torch.device
    inputs: Sequence[Tensor]
    cotangents: Sequence[Tensor]
    expected: Sequence[Tensor]
    scales: Sequence[float]
    moved: dict[str, int]
    contestants: Sequence[Contestant] = field(default=())

    def rows(self, setting: Setting) -> Iterator[Row]:
        """Two rows per contestant, forward and backward; one that says why for a contestant that is absent or wrong."""
        copies = {name: copy_speed(self.device, self.moved[name], setting.seconds) for name in DIRECTIONS}
        for contestant in self.contestants:
            labels = {**self.labels, "peer" if contestant.backend is None else "backend": contestant.name}
            with ops.backend(contestant.backend or "reference"):
                try:
                    for row in self._rows_of(contestant, setting.seconds, copies):
                        yield labels | row
                except AbsentError as reason:
                    yield labels | {"absent": str(reason)}
                except torch.OutOfMemoryError as error:
                    yield labels | {"absent": f"out of memory: {str(error).splitlines()[0]}"}

    def _rows_of(self, contestant: Contestant, seconds: float, copies: dict[str, float]) -> Iterator[Row]:
        forward = contestant.prepare()
        results = forward()
        wrong = self.error(contestant, [*results, *self.gradients(results)])
        if not wrong <= 1:
            yield {"wrong": f"error is {wrong:.3g} times the tolerance"}
            return
        for direction in DIRECTIONS:
            backward = direction == "backward"
            with torch.set_grad_enabled(backward):
                times = measure((lambda: self.gradients(results)) if backward else forward, self.device, seconds)
            moved = self.moved[direction]
            yield {
                "direction": direction,
                **vars(times),
                "bytes": moved,
                "copy_bytes_per_second": round(copies[direction]),
                "share_of_copy_speed": round(moved / (times.median_us / 1e6) / copies[direction], 4),
                "error_over_tolerance": float(f"{wrong:.3g}"),
            }

    def gradients(self, results: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Of all inputs."""
        return torch.autograd.grad(list(results), list(self.inputs), list(self.cotangents), retain_graph=True)

    def error(self, contestant: Contestant, tensors: Sequence[Tensor]) -> float:
        """Largest error over its tolerance; infinity for NaN."""
        worst = 0.0
        for mine, right, scale in zip(tensors, self.expected, self.scales, strict=True):
            eps = max(torch.finfo(mine.dtype).eps, torch.finfo(contestant.computes_in).eps)
            error = float(torch.linalg.vector_norm(mine.detach().double() - right))
            worst = max(worst, math.inf if math.isnan(error) else error / (contestant.roundings * eps * scale))
        return worst


def ours(names: Sequence[str], forward: Forward, device: torch.device, roundings: float) -> list[Contestant]:
    """One contestant per backend of ours; inside, ``forward`` runs on that backend."""

    def prepare() -> Forward:
        try:
            backends.choose(device)
        except RuntimeError as error:
            raise AbsentError(str(error).partition(", but ")[2] or str(error)) from None
        return forward

    return [Contestant(name, prepare, roundings, backend=name) for name in names]
