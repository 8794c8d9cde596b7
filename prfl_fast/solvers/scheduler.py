"""A scheduler as it is: its own ``step`` stays in the graph, bit for bit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from prfl_fast.ops.solver_step import as_mask
from prfl_fast.solvers.base import GeneratorLike, NonlinearSchedulerError, Solver
from prfl_fast.solvers.casts import KeepFloat64
from prfl_fast.solvers.probe import Probes, read_original, record_step
from prfl_fast.solvers.replay import PROBE_SHAPE, Replay
from prfl_fast.solvers.schedule import denoised_prediction, noise_levels


class SchedulerSolver(Solver):
    """Runs ``scheduler.step`` of a private copy, in any order of steps.

    The latents are those of the scheduler's own loop, bit for bit, in whatever dtype it gives them; so the step need
    not be linear (thresholding, clipping). The adjoint of a step is autograd on that step.

    Args:
        scheduler: a diffusers scheduler; stays as it is.
        num_inference_steps: None takes the timesteps that the caller's ``set_timesteps`` left.
        start_step: the first step, with an empty history.

    Raises:
        NonFiniteSchedulerError: a step that gives NaN or infinity for finite input.
        NonlinearSchedulerError: run state other than tensors of the latents' shape that depends on their values, so
            that a step can't be repeated as a function.
        TypeError, ValueError: no scheduler, or steps that it refuses.
    """

    def __init__(self, scheduler: Any, num_inference_steps: int | None, *, start_step: int = 0) -> None:
        self._replay = Replay(scheduler, num_inference_steps, start_step)
        self.scheduler_name = type(scheduler).__name__
        self.num_steps = self._replay.num_steps
        self.start_step = start_step
        self.timesteps = self._replay.timesteps
        self.sigmas = noise_levels(self._replay)
        self.linear = False
        self._denoised: dict[int, tuple[float, float]] = {}
        again = Replay(scheduler, num_inference_steps, start_step)
        probes, others = Probes(0), Probes(1)
        with torch.no_grad():
            for i in range(start_step, self.num_steps):
                record_step(self._replay, i, probes)
                with KeepFloat64(PROBE_SHAPE.numel()):
                    probe = record_step(again, i, others)
                scale = float(probe.scaled[0].flatten()[0])
                told = read_original(probe, others)
                self._denoised[i] = told or denoised_prediction(self._replay.scheduler, float(self.sigmas[i]), scale)
        changed = self._replay.difference(again)
        if changed is not None:
            raise NonlinearSchedulerError(
                f"scheduler: {self.scheduler_name} keeps {changed!r}, which depends on the latents' values and is no "
                "tensor of their shape; its steps can't be repeated as functions of latents and history"
            )
        self._replay.release()

    def __repr__(self) -> str:
        start = f", from step {self.start_step}" if self.start_step else ""
        return f"SchedulerSolver({self.scheduler_name}, {self.num_steps} steps{start})"

    def initial_state(self, latents: Tensor) -> tuple[Tensor, ...]:
        return (latents,)

    def scale_input(self, i: int, x: Tensor) -> Tensor:
        self._check_step(i)
        return self._replay.scale(i, x)

    def draw_noise(
        self, i: int, like: Tensor, generator: GeneratorLike, *, model_dtype: torch.dtype | None = None
    ) -> tuple[Tensor, ...]:
        self._check_step(i)
        return self._replay.draw_noise(i, like, generator, model_dtype)

    def step(
        self,
        i: int,
        state: tuple[Tensor, ...],
        model_output: Tensor,
        noise: tuple[Tensor, ...] = (),
        latent_mask: Tensor | None = None,
        *,
        unconditional: Tensor | None = None,
        guidance_scale: float = 1.0,
    ) -> tuple[Tensor, ...]:
        self._check_step(i)
        if unconditional is not None:
            raise ValueError("unconditional: expected None, the scheduler's own step takes one output; combine them")
        count = 1 + self._replay.num_slots(i)
        if len(state) != count:
            raise ValueError(f"state: expected {count} tensors before step {i}, got {len(state)}")
        x, *history = state
        result = self._replay.step(i, x, history, model_output, noise)
        new_x = result.x if latent_mask is None else torch.where(as_mask(latent_mask), result.x, x)
        return (new_x, *result.slots)

    def pullback(
        self,
        i: int,
        state: tuple[Tensor, ...] | None,
        model_output: Tensor | None,
        noise: tuple[Tensor, ...],
        cotangents: Sequence[Tensor | None],
        latent_mask: Tensor | None = None,
        *,
        output_dtypes: Sequence[torch.dtype] | None = None,
        guidance_scale: float = 1.0,
    ) -> tuple[tuple[Tensor | None, ...], tuple[Tensor | None, ...]]:
        if output_dtypes is not None and len(output_dtypes) > 1:
            raise ValueError(f"output_dtypes: expected at most one, as the step had, got {len(output_dtypes)}")
        if state is None or model_output is None:
            raise ValueError("state, model_output: expected those of the step's forward; its adjoint depends on values")
        leaves = tuple(entry.detach().requires_grad_() for entry in state)
        output = model_output.detach()
        wanted = () if output_dtypes is not None and not output_dtypes else (output.requires_grad_(),)
        with torch.enable_grad():
            result = self.step(i, leaves, output, noise, latent_mask)
        if len(cotangents) > len(result):
            raise ValueError(f"cotangents: expected at most {len(result)} tensors, got {len(cotangents)}")
        # Missing cotangents at the end are zero.
        given = zip(result, cotangents, strict=False)
        pairs = [(r, g.to(r.dtype)) for r, g in given if g is not None and r.requires_grad]
        if not pairs:
            return (None,) * len(leaves), (None,) * len(wanted)
        ends, gradients = zip(*pairs, strict=True)
        into = torch.autograd.grad(ends, (*leaves, *wanted), gradients, allow_unused=True)
        into_outputs = into[len(leaves) :]
        if output_dtypes:
            into_outputs = tuple(None if g is None else g.to(output_dtypes[0]) for g in into_outputs)
        return into[: len(leaves)], into_outputs

    def original_coefficients(self, i: int) -> tuple[float, float]:
        self._check_step(i)
        return self._denoised[i]
