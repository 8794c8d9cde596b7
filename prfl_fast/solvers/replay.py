"""A private scheduler that can be put to the beginning of any of its steps, with any latents and history."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from prfl_fast.solvers.base import GeneratorLike, NonlinearSchedulerError
from prfl_fast.solvers.brownian import Interval, tree_noise
from prfl_fast.solvers.draws import Draws, Supply, draw, given
from prfl_fast.solvers.private import private_scheduler
from prfl_fast.solvers.snapshot import Snapshot

# Batch, and a form that no table of a scheduler has by chance.
PROBE_SHAPE = torch.Size((6, 4, 1, 4, 4))

# dtype of a draw, and the interval of the Brownian tree where it comes from one
_Drawn = tuple[torch.dtype, Interval | None]


@dataclass(frozen=True)
class StepResult:
    """What ``scheduler.step`` gave: latents, the history's tensors, the denoised prediction if it tells it."""

    x: Tensor
    slots: tuple[Tensor, ...]
    original: Tensor | None = None


def _is_slot(tensor: Tensor) -> bool:
    return tensor.shape == PROBE_SHAPE and tensor.is_floating_point()


class Replay:
    """Steps of a private copy of ``scheduler`` in any order.

    First every step is *recorded* once, from ``start_step`` on, with tensors of ``PROBE_SHAPE``: that finds where the
    scheduler keeps latent-shaped tensors and what else it changes. Afterwards ``step(i, ...)`` runs any step on
    tensors of any shape, dtype and device.

    Attributes:
        scheduler: the copy.
        timesteps: ``[N]`` on the CPU.
        num_steps: N.
        offset: position of step 0 in the scheduler's sigmas.
        start_step: the first step.
        num_draws: per recorded step, how many noise tensors it draws.
    """

    def __init__(self, scheduler: Any, num_inference_steps: int | None, start_step: int) -> None:
        private = private_scheduler(scheduler, num_inference_steps, start_step)
        self.scheduler = private.scheduler
        self.timesteps = private.timesteps
        self.num_steps = len(private.timesteps)
        self.offset = private.offset
        self.start_step = start_step
        self.num_draws: dict[int, int] = {}
        self._times = list(self.timesteps)
        self._scale = getattr(self.scheduler, "scale_model_input", None)
        parameters = inspect.signature(self.scheduler.step).parameters
        variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        more = [k for k, p in list(parameters.items())[3:] if p.default is p.empty and p.kind not in variadic]
        if more:
            raise TypeError(
                f"scheduler: expected step(model_output, timestep, sample), but {type(scheduler).__name__}.step needs "
                f"{', '.join(more)} as well"
            )
        self._options = {k: v for k, v in (("generator", None), ("return_dict", False)) if k in parameters}
        self._lock = threading.RLock()
        # Before and after scale_model_input, which may set the step index.
        self._before: dict[int, Snapshot] = {start_step: Snapshot(self.scheduler, _is_slot)}
        self._ready: dict[int, Snapshot] = {}
        self._drawn: dict[tuple[int, torch.dtype, torch.dtype], tuple[_Drawn, ...]] = {}

    def num_slots(self, i: int) -> int:
        """Tensors of history before step i, which must be recorded up to there."""
        return self._before[i].num_slots

    def record(
        self, i: int, x: Tensor, slots: Sequence[Tensor], model_output: Tensor, supply: Supply
    ) -> tuple[Tensor, StepResult]:
        """Runs step i for the first time; gives the scaled input and the result."""
        self._before[i].restore(slots)
        scaled = x if self._scale is None else self._scale(x, self._times[i])
        self._ready[i] = Snapshot(self.scheduler, _is_slot)
        if self._ready[i].num_slots != len(slots):
            raise NonlinearSchedulerError(
                f"scheduler: {type(self.scheduler).__name__}.scale_model_input keeps its input; expected no change of "
                "the history"
            )
        count = 0

        def counted(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
            nonlocal count
            count += 1
            return supply(shape, dtype, device)

        options = {**self._options, "return_dict": True} if "return_dict" in self._options else self._options
        try:
            with Draws(counted):
                result = self.scheduler.step(model_output, self._times[i], x, **options)
        except (AssertionError, AttributeError, LookupError, NameError, RuntimeError, TypeError) as error:
            # NotImplementedError, which some raise for settings of theirs, is a RuntimeError.
            raise ValueError(
                f"scheduler: {type(self.scheduler).__name__} fails in step {i} of {self.num_steps} with these "
                f"settings: {type(error).__name__}: {error}"
            ) from error
        self.num_draws[i] = count
        after = Snapshot(self.scheduler, _is_slot)
        self._before[i + 1] = after
        new_x = _latents(result)
        if new_x.shape != PROBE_SHAPE:
            raise NonlinearSchedulerError(
                f"scheduler: {type(self.scheduler).__name__}.step changes the latents' shape in step {i}"
            )
        return scaled, StepResult(new_x, after.collect(), getattr(result, "pred_original_sample", None))

    def release(self) -> None:
        """Drops the tensors of the last run: what the steps gave is not to be kept alive from here."""
        self._before[self.start_step].restore(())

    def scale(self, i: int, x: Tensor, slots: Sequence[Tensor] = ()) -> Tensor:
        """``scale_model_input`` of step i."""
        if self._scale is None:
            return x
        with self._lock:
            # The input's scaling knows no history; the slots are filled for form's sake.
            self._before[i].restore(slots or (x,) * self.num_slots(i))
            try:
                scaled: Tensor = self._scale(x, self._times[i])
            finally:
                self.release()
        return scaled

    def step(
        self, i: int, x: Tensor, slots: Sequence[Tensor], model_output: Tensor, noise: Sequence[Tensor] = ()
    ) -> StepResult:
        """``scheduler.step`` of step i, as a function."""
        if len(noise) != self.num_draws[i]:
            raise ValueError(f"noise: step {i} draws {self.num_draws[i]} tensors, got {len(noise)}; see draw_noise")
        with self._lock:
            self._ready[i].restore(slots)
            try:
                with Draws(given(noise, i)) if noise else nullcontext():
                    result = self.scheduler.step(model_output, self._times[i], x, **self._options)
                collected = self._before[i + 1].collect()
            finally:
                self.release()
        return StepResult(_latents(result), collected)

    def draw_noise(
        self, i: int, like: Tensor, generator: GeneratorLike, model_dtype: torch.dtype | None
    ) -> tuple[Tensor, ...]:
        """The draws of step i for latents like ``like``."""
        if not self.num_draws[i]:
            return ()
        kinds = self._kinds_of_draws(i, like.dtype, like.dtype if model_dtype is None else model_dtype)
        return tuple(
            draw(like.shape, dtype, like.device, generator)
            if interval is None
            else tree_noise(self.scheduler, interval, like.shape, dtype, like.device, generator)
            for dtype, interval in kinds
        )

    def _kinds_of_draws(self, i: int, dtype: torch.dtype, model_dtype: torch.dtype) -> tuple[_Drawn, ...]:
        """A dry run on a few zeros tells them: some schedulers draw in float32, some in the model's dtype."""
        key = (i, dtype, model_dtype)
        if key not in self._drawn:
            seen: list[_Drawn] = []

            def supply(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
                seen.append((dtype, getattr(self.scheduler, "asked", None)))
                return torch.zeros(shape, dtype=dtype, device=device)

            x = torch.zeros(PROBE_SHAPE, dtype=dtype, device="cpu")
            with self._lock, torch.no_grad():
                self._ready[i].restore((x,) * self.num_slots(i))
                try:
                    with Draws(supply):
                        self.scheduler.step(x.to(model_dtype), self._times[i], x, **self._options)
                finally:
                    self.release()
            self._drawn[key] = tuple(seen)
        return self._drawn[key]

    def difference(self, other: Replay) -> str | None:
        """What two recordings disagree about, history's tensors aside: run state that depends on values."""
        for i, snapshot in self._before.items():
            for name in sorted(snapshot.difference(other._before[i])):
                # Objects that can't be compared differ from the first; what no step changed can't depend on values.
                if name in self._changed(i) or name in other._changed(i):
                    return name
        return None

    def _changed(self, i: int) -> set[str]:
        return self._before[i].difference(self._before[self.start_step])


def _latents(result: Any) -> Tensor:
    latents = result if isinstance(result, Tensor) else result[0]
    if not isinstance(latents, Tensor):
        raise TypeError(f"scheduler: expected its step to give a tensor, got {type(latents).__name__}")
    return latents
