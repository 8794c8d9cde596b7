"""Gradient modes held against the exact gradient: direction, size, variance, network calls, memory, time."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prfl_fast.charts import TONES, Mark, Row, dot_chart, picture
from prfl_fast.memory.trace import LiveBytes
from prfl_fast.models import adapter_for
from prfl_fast.sampling.door import unrolled_sample
from prfl_fast.sampling.modes import GradientMode, resolve_mode
from prfl_fast.solvers import make_solver

Reward = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class GradientRow:
    """One mode.

    Attributes:
        cosine, norm_ratio: to the exact parameter gradient, and over its norm; means over the batches of latents.
        network_calls: of forward and backward; a mean over the batches, for some modes draw how many.
        seconds, peak_bytes: of the first batch; bytes live on the device above those at the start.
        variance: of the gradient from one batch to another (initial noise, noise of the steps, draws of the mode),
            relative to the squared norm of its mean: ``E|g - Eg|^2 / |Eg|^2``, without the bias of few batches. NaN for
            one batch, infinite where the mean does not stand out of the noise.
        cosines, norm_ratios: one per batch.
    """

    mode: str
    cosine: float
    norm_ratio: float
    network_calls: float
    seconds: float
    peak_bytes: int
    variance: float = math.nan
    cosines: tuple[float, ...] = ()
    norm_ratios: tuple[float, ...] = ()

    @property
    def variance_per_call(self) -> float:
        """``variance * network_calls``: what is left of the variance when the calls of one network evaluation buy as
        many independent estimates as they can, times that evaluation's price. Of two modes with the same mean the one
        with the lower number learns more from the same computation."""
        return self.variance * self.network_calls


@dataclass(frozen=True)
class GradientComparison:
    """Rows of :func:`compare_gradients`, the exact gradient first; prints as a table."""

    rows: tuple[GradientRow, ...]

    def __str__(self) -> str:
        head = ("mode", "cosine", "norm ratio", "calls", "variance/call", "seconds", "peak MiB")
        table = [head, *map(_cells, self.rows)]
        widths = [max(len(line[i]) for line in table) for i in range(len(head))]
        lines = [[cell.rjust(width) for cell, width in zip(line, widths, strict=True)] for line in table]
        for line, cells in zip(table, lines, strict=True):
            cells[0] = line[0].ljust(widths[0])
        return "\n".join(map("  ".join, lines))

    def to_dicts(self) -> list[dict[str, Any]]:
        """Rows as plain dictionaries."""
        return [{**asdict(row), "variance_per_call": row.variance_per_call} for row in self.rows]

    def plot(self, path: str | PathLike[str]) -> None:
        """Writes cosine, norm ratio, network calls and variance of every mode as one SVG picture.

        A dot a batch, their mean as a bar with twice its standard error to each side. A mode whose variance is not
        finite is left out of that panel, and the panel where there is one batch.
        """
        exact = Mark(1.0, "exact")
        panels = [
            ("cosine to the exact gradient", self._dots("cosine", lambda row: row.cosines, exact)),
            ("norm over the exact gradient's", self._dots("norm ratio", lambda row: row.norm_ratios, exact)),
            ("network calls", self._dots("calls", lambda row: (row.network_calls,))),
        ]
        if any(math.isfinite(row.variance) for row in self.rows):
            variances = self._dots("variance per call", lambda row: (row.variance_per_call,))
            panels.append(("relative variance times network calls", variances))
        Path(path).write_text(picture(panels, columns=2), encoding="utf-8")

    def _dots(self, label: str, values: Callable[[GradientRow], Sequence[float]], mark: Mark | None = None) -> str:
        rows = []
        for number, row in enumerate(self.rows):
            own = values(row)
            if not all(map(math.isfinite, own)):
                continue
            mean = sum(own) / len(own)
            spread = sum((v - mean) ** 2 for v in own) / max(1, len(own) - 1) / len(own)
            error = 2 * spread**0.5
            rows.append(Row(row.mode, TONES[number % len(TONES)], own, mean, mean - error, mean + error))
        return dot_chart(rows, title=label, x_label=label, marks=() if mark is None else (mark,))


def _cells(row: GradientRow) -> tuple[str, ...]:
    return (
        row.mode,
        f"{row.cosine:.4f}",
        f"{row.norm_ratio:.4f}",
        f"{row.network_calls:g}" if float(row.network_calls).is_integer() else f"{row.network_calls:.1f}",
        "-" if math.isnan(row.variance) else f"{row.variance_per_call:.3g}",
        f"{row.seconds:.3f}",
        f"{row.peak_bytes / 2**20:.2f}",
    )


@contextmanager
def _set_aside(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """The user's own gradients are put aside and come back untouched."""
    own = [p.grad for p in parameters]
    try:
        for parameter in parameters:
            parameter.grad = None
        yield
    finally:
        for parameter, grad in zip(parameters, own, strict=True):
            parameter.grad = grad


@contextmanager
def _peak(device: torch.device) -> Iterator[Callable[[], int]]:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        start = torch.cuda.memory_allocated(device)
        yield lambda: torch.cuda.max_memory_allocated(device) - start
    else:
        with LiveBytes() as live:
            yield lambda: live.peak


def measure_gradient(
    parameters: Sequence[nn.Parameter], backward: Callable[[], int], device: torch.device
) -> tuple[list[Tensor | None], int, float, int]:
    """Runs ``backward`` (which gives its number of network calls) twice, once for time and once for memory, since
    counting bytes costs time.

    Returns:
        Gradients of the parameters, network calls, seconds, peak bytes above the start.
    """
    with _set_aside(parameters):
        with _peak(device) as peak:
            calls = backward()
            peak_bytes = peak()
        gradients = [p.grad for p in parameters]
    with _set_aside(parameters):
        start = time.perf_counter()
        backward()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - start
    return gradients, calls, seconds, peak_bytes


def gradient_agreement(gradients: Sequence[Tensor | None], exact: Sequence[Tensor | None]) -> tuple[float, float]:
    """Cosine and norm ratio of two gradients given parameter by parameter, in float64; None counts as zero."""
    dot = own = reference = 0.0
    for a, b in zip(gradients, exact, strict=True):
        own += 0.0 if a is None else float(a.detach().double().square().sum())
        reference += 0.0 if b is None else float(b.detach().double().square().sum())
        if a is not None and b is not None:
            dot += float((a.detach().double() * b.detach().double()).sum())
    if reference == 0:
        raise ValueError("compare_gradients: the exact gradient is zero; the reward does not depend on the parameters")
    return (dot / (own * reference) ** 0.5 if own > 0 else 0.0), (own / reference) ** 0.5


class _Spread:
    """Mean gradient and mean squared norm of several estimates, one after the other."""

    def __init__(self) -> None:
        self._count = 0
        self._squares = 0.0
        self._sums: list[Tensor | None] = []

    def add(self, gradients: Sequence[Tensor | None]) -> None:
        """One estimate, parameter by parameter; None counts as zero."""
        self._count += 1
        self._squares += sum(float(g.detach().double().square().sum()) for g in gradients if g is not None)
        kept = self._sums or [None] * len(gradients)
        self._sums = [
            s if g is None else g.detach().double() + (0 if s is None else s)
            for g, s in zip(gradients, kept, strict=True)
        ]

    def relative_variance(self) -> float:
        """``E|g - Eg|^2 / |Eg|^2`` with both parts unbiased; see GradientRow."""
        if self._count < 2:
            return math.nan
        of_mean = sum(float(s.square().sum()) for s in self._sums if s is not None) / self._count**2
        variance = max(0.0, (self._squares - self._count * of_mean) / (self._count - 1))
        signal = of_mean - variance / self._count
        return variance / signal if signal > 0 else math.inf


def compare_gradients(
    transformer: Any,
    scheduler: Any,
    latents: Tensor | Sequence[Tensor],
    num_inference_steps: int | None = 40,
    *,
    reward: Reward,
    modes: Sequence[str | GradientMode],
    generator_seed: int = 0,
    **arguments: Any,
) -> GradientComparison:
    """Compares each mode's parameter gradient of the mean reward with the exact one of the full chain.

    Args:
        transformer, scheduler, num_inference_steps: as in :func:`unrolled_sample`.
        latents: as there; or several batches of initial noise, so that the gradient's variance is measured, too
            (``[noise] * 8``: that of the mode's draws alone).
        reward: ``reward(latents, timestep)`` -> values, summed over nothing and averaged here; with ``decode=`` among
            the arguments ``reward(frames, timestep)``.
        modes: gradient modes to compare; the exact one is run first in any case.
        generator_seed: every mode starts from this seed, plus 1 for each further batch, so that random modes, noise
            and dropout repeat.
        **arguments: further arguments of :func:`unrolled_sample`; ``gradient`` and ``generator`` are set here.

    Returns:
        A :class:`GradientComparison`; ``print`` it. Modes that end the chain early (``prfl``) are rewarded there.
        No ``.grad`` is touched: not the parameters', the latents', the conditioning's, nor the reward's.

    Raises:
        ValueError: no trainable parameter, a zero exact gradient, or what ``unrolled_sample`` refuses.
    """
    taken = {"gradient", "generator", "graph"} & arguments.keys()
    if taken:
        raise ValueError(f"compare_gradients: {', '.join(sorted(taken))} is set by the comparison itself")
    module = adapter_for(transformer).module()
    second = arguments.get("transformer_2")
    modules = [m for m in (module, second) if isinstance(m, nn.Module)]
    parameters = [p for m in modules for p in m.parameters() if p.requires_grad]
    if not parameters:
        raise ValueError("transformer: expected a module with at least one trainable parameter")
    batches = [latents] if isinstance(latents, Tensor) else list(latents)
    if not batches or not all(isinstance(noise, Tensor) for noise in batches):
        got = ", ".join(sorted({type(noise).__name__ for noise in batches})) or "an empty sequence"
        raise TypeError(f"latents: expected a tensor or a sequence of tensors, got {got}")
    _check_modes(scheduler, num_inference_steps, modes, arguments)
    # Sharding reduces gradients beside autograd's own parameters, so it needs a whole backward.
    sharded = any("FSDP" in c.__name__ for m in modules for part in m.modules() for c in type(part).__mro__)
    device = batches[0].device
    devices = [device] if device.type == "cuda" else []

    def backward(mode: str | GradientMode, number: int) -> int:
        seed, noise = generator_seed + number, batches[number]
        generator = torch.Generator(device).manual_seed(seed)
        with torch.random.fork_rng(devices):
            torch.manual_seed(seed)
            sample = unrolled_sample(
                transformer, scheduler, noise, num_inference_steps, gradient=mode, generator=generator, **arguments
            )
            decode = sample.decode if arguments.get("decode") is not None else _as_they_are
            values = [reward(decode(tap.latents), tap.timestep).mean() for tap in sample.taps]
            torch.stack(values).sum().backward(inputs=None if sharded else parameters)
        return sample.network_calls

    every = ["full", *(m for m in modes if m != "full")]
    notes = [_Notes() for _ in every]
    for number in range(len(batches)):
        exact: list[Tensor | None] = []
        for mode, note in zip(every, notes, strict=True):
            run = partial(backward, mode, number)
            if number == 0:
                gradients, calls, note.seconds, note.peak_bytes = measure_gradient(parameters, run, device)
            else:
                with _set_aside(parameters):
                    calls = run()
                    gradients = [p.grad for p in parameters]
            exact = exact or gradients
            note.add(gradients, exact, calls, keep=len(batches) > 1)
    return GradientComparison(tuple(note.row(mode) for mode, note in zip(every, notes, strict=True)))


class _Notes:
    """What is noted of one mode, batch by batch."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.peak_bytes = 0
        self._agreement: list[tuple[float, float]] = []
        self._calls: list[int] = []
        self._spread = _Spread()

    def add(
        self, gradients: Sequence[Tensor | None], exact: Sequence[Tensor | None], calls: int, *, keep: bool
    ) -> None:
        self._agreement.append(gradient_agreement(gradients, exact))
        self._calls.append(calls)
        if keep:
            self._spread.add(gradients)

    def row(self, mode: str | GradientMode) -> GradientRow:
        cosines, ratios = zip(*self._agreement, strict=True)
        count = len(cosines)
        calls = sum(self._calls) / count
        return GradientRow(
            mode if isinstance(mode, str) else "custom",
            sum(cosines) / count,
            sum(ratios) / count,
            int(calls) if calls.is_integer() else calls,
            self.seconds,
            self.peak_bytes,
            self._spread.relative_variance(),
            cosines,
            ratios,
        )


def _as_they_are(latents: Tensor) -> Tensor:
    return latents


def _check_modes(
    scheduler: Any, num_inference_steps: int | None, modes: Sequence[str | GradientMode], arguments: dict[str, Any]
) -> None:
    """Refuses a wrong mode before the exact gradient is paid for."""
    if isinstance(modes, str):
        raise TypeError(f"modes: expected a sequence of gradient modes, got the string {modes!r}")
    start_step = arguments.get("start_step", 0)
    solver = make_solver(
        scheduler, num_inference_steps, start_step=start_step, kind=arguments.get("solver", "auto")
    )
    taps = arguments.get("supervise")
    for mode in modes:
        if mode == "none":
            raise ValueError("modes: 'none' has no gradient to compare")
        resolve_mode(
            mode,
            num_steps=solver.num_steps,
            start_step=start_step,
            stop_step=arguments.get("stop_step"),
            supervise=None if taps is None else tuple(taps),
            generator=torch.Generator(),
        )
