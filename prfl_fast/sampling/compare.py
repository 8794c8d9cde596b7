"""Gradient modes held against the exact gradient: direction, size, network calls, memory, time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from prfl_fast.memory.trace import LiveBytes
from prfl_fast.models import adapter_for
from prfl_fast.sampling.door import unrolled_sample
from prfl_fast.sampling.modes import GradientMode, resolve_mode
from prfl_fast.solvers import make_solver

Reward = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class GradientRow:
    """One mode: ``cosine`` to the exact parameter gradient and ``norm_ratio`` over its norm; ``network_calls`` of
    forward and backward; ``seconds`` and ``peak_bytes`` (live on the device, above those at the start)."""

    mode: str
    cosine: float
    norm_ratio: float
    network_calls: int
    seconds: float
    peak_bytes: int


@dataclass(frozen=True)
class GradientComparison:
    """Rows of :func:`compare_gradients`, the exact gradient first; prints as a table."""

    rows: tuple[GradientRow, ...]

    def __str__(self) -> str:
        lines = [f"{'mode':<12}{'cosine':>9}{'norm ratio':>12}{'calls':>7}{'seconds':>10}{'peak MiB':>10}"]
        for row in self.rows:
            lines.append(
                f"{row.mode:<12}{row.cosine:>9.4f}{row.norm_ratio:>12.4f}{row.network_calls:>7}"
                f"{row.seconds:>10.3f}{row.peak_bytes / 2**20:>10.2f}"
            )
        return "\n".join(lines)

    def to_dicts(self) -> list[dict[str, Any]]:
        """Rows as plain dictionaries."""
        return [asdict(row) for row in self.rows]


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


def compare_gradients(
    transformer: Any,
    scheduler: Any,
    latents: Tensor,
    num_inference_steps: int | None = 40,
    *,
    reward: Reward,
    modes: Sequence[str | GradientMode],
    generator_seed: int = 0,
    **arguments: Any,
) -> GradientComparison:
    """Compares each mode's parameter gradient of the mean reward with the exact one of the full chain.

    Args:
        transformer, scheduler, latents, num_inference_steps: as in :func:`unrolled_sample`.
        reward: ``reward(latents, timestep)`` -> values, summed over nothing and averaged here; with ``decode=`` among
            the arguments ``reward(frames, timestep)``.
        modes: gradient modes to compare; the exact one is run first in any case.
        generator_seed: every mode starts from this seed, so that random modes, noise and dropout repeat.
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

    _check_modes(scheduler, num_inference_steps, modes, arguments)
    # Sharding reduces gradients beside autograd's own parameters, so it needs a whole backward.
    sharded = any("FSDP" in c.__name__ for m in modules for part in m.modules() for c in type(part).__mro__)
    devices = [latents.device] if latents.device.type == "cuda" else []

    def backward(mode: str | GradientMode) -> int:
        generator = torch.Generator(latents.device).manual_seed(generator_seed)
        with torch.random.fork_rng(devices):
            torch.manual_seed(generator_seed)
            sample = unrolled_sample(
                transformer, scheduler, latents, num_inference_steps, gradient=mode, generator=generator, **arguments
            )
            decode = sample.decode if arguments.get("decode") is not None else _as_they_are
            values = [reward(decode(tap.latents), tap.timestep).mean() for tap in sample.taps]
            torch.stack(values).sum().backward(inputs=None if sharded else parameters)
        return sample.network_calls

    rows: list[GradientRow] = []
    exact: list[Tensor | None] = []
    for mode in ["full", *(m for m in modes if m != "full")]:
        gradients, calls, seconds, peak = measure_gradient(parameters, partial(backward, mode), latents.device)
        if not rows:
            exact = gradients
        cosine, ratio = gradient_agreement(gradients, exact)
        name = mode if isinstance(mode, str) else "custom"
        rows.append(GradientRow(name, cosine, ratio, calls, seconds, peak))
    return GradientComparison(tuple(rows))


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
