"""A scheduler as a table of numbers: its steps read off by probing, its chain run without it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from prfl_fast.ops import StepCoefficients, solver_step, solver_step_transpose
from prfl_fast.solvers.base import GeneratorLike, NonlinearSchedulerError, Solver
from prfl_fast.solvers.casts import KeepFloat64
from prfl_fast.solvers.probe import (
    EXACT,
    ROUNDED,
    Probes,
    check_step,
    read_original,
    read_scale,
    read_step,
    record_step,
    step_matrix,
)
from prfl_fast.solvers.pruning import prune
from prfl_fast.solvers.replay import PROBE_SHAPE, Replay
from prfl_fast.solvers.schedule import denoised_prediction, noise_levels


@dataclass(frozen=True, eq=False, repr=False)
class SolverTable(Solver):
    """``z[i+1] = A[i] z[i] + B[i] m[i] + C[i] eps`` with the numbers of a scheduler.

    Steps run in float32, in float64 when the latents are float64. Half-precision latents are raised to float32.

    Attributes:
        scheduler_name: class of the scheduler.
        num_steps, start_step, timesteps, sigmas, linear: see :class:`Solver`.
        coefficients: A, B and C of the steps ``start_step .. N - 1``, float64; :meth:`step_coefficients` counts as the
            steps do.
        input_scales: s of ``scale_model_input(x) = s x``, of the same steps.
        denoised: (a, b) of the denoised prediction ``a x + b m``, of the same steps.

    Example:
        >>> print(prfl_fast.SolverTable.from_scheduler(pipe.scheduler, 40))
    """

    scheduler_name: str
    num_steps: int
    start_step: int
    timesteps: Tensor
    sigmas: Tensor
    coefficients: tuple[StepCoefficients, ...]
    input_scales: tuple[float, ...]
    denoised: tuple[tuple[float, float], ...]
    # Of schedulers that draw noise; it knows in which dtype.
    _replay: Replay | None = field(default=None)
    linear: bool = field(default=True, init=False)

    @classmethod
    def from_scheduler(cls, scheduler: Any, num_inference_steps: int | None, *, start_step: int = 0) -> SolverTable:
        """Probes a private copy of ``scheduler`` in float64; the scheduler itself stays as it is.

        Where the scheduler rounds latents to float32 inside, the table holds the map without that rounding, and it is
        checked that the rounding alone makes the difference.

        Args:
            scheduler: a diffusers scheduler.
            num_inference_steps: None takes the timesteps that the caller's ``set_timesteps`` left.
            start_step: the first step, with an empty history.

        Raises:
            NonlinearSchedulerError: a step that is not linear in latents, history, network output and noise.
            NonFiniteSchedulerError: a step that gives NaN or infinity for finite input.
            TypeError, ValueError: no scheduler, or steps that it refuses.
        """
        replay = Replay(scheduler, num_inference_steps, start_step)
        again = Replay(scheduler, num_inference_steps, start_step)
        probes, others = Probes(0), Probes(1)
        sigmas = noise_levels(replay)
        coefficients, scales, denoised = [], [], []
        with torch.no_grad():
            for i in range(start_step, replay.num_steps):
                with KeepFloat64(PROBE_SHAPE.numel()) as casts:
                    probe = record_step(replay, i, probes)
                coefficients.append(read_step(replay, i, probe, probes))
                scales.append(read_scale(replay, i, probe, probes))
                told = read_original(probe, probes)
                denoised.append(told or denoised_prediction(replay.scheduler, float(sigmas[i]), scales[-1]))
                # Other values, other history, and the scheduler exactly as it is.
                matrix = step_matrix(coefficients[-1])
                check_step(again, i, matrix, record_step(again, i, others), others, ROUNDED if casts.count else EXACT)
        changed = replay.difference(again)
        if changed is not None:
            raise NonlinearSchedulerError(
                f"scheduler: {type(scheduler).__name__} keeps {changed!r}, which depends on the latents' values, so "
                "its steps are no fixed linear map; use solver='scheduler'"
            )
        replay.release()
        return cls(
            scheduler_name=type(scheduler).__name__,
            num_steps=replay.num_steps,
            start_step=start_step,
            timesteps=replay.timesteps,
            sigmas=sigmas,
            coefficients=tuple(prune(coefficients)),
            input_scales=tuple(scales),
            denoised=tuple(denoised),
            _replay=replay if any(replay.num_draws.values()) else None,
        )

    def step_coefficients(self, i: int) -> StepCoefficients:
        """A, B and C of step i."""
        self._check_step(i)
        return self.coefficients[i - self.start_step]

    def initial_state(self, latents: Tensor) -> tuple[Tensor, ...]:
        return (latents if latents.dtype in (torch.float32, torch.float64) else latents.float(),)

    def scale_input(self, i: int, x: Tensor) -> Tensor:
        self._check_step(i)
        scale = self.input_scales[i - self.start_step]
        return x if scale == 1 else x * scale

    def draw_noise(
        self, i: int, like: Tensor, generator: GeneratorLike, *, model_dtype: torch.dtype | None = None
    ) -> tuple[Tensor, ...]:
        self._check_step(i)
        return () if self._replay is None else self._replay.draw_noise(i, like, generator, model_dtype)

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
        outputs = (model_output,) if unconditional is None else (model_output, unconditional)
        return solver_step(
            state,
            outputs,
            self.step_coefficients(i),
            guidance_scale=guidance_scale,
            noise=noise,
            latent_mask=latent_mask,
        )

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
        return solver_step_transpose(
            cotangents,
            self.step_coefficients(i),
            output_dtypes=output_dtypes,
            guidance_scale=guidance_scale,
            latent_mask=latent_mask,
        )

    def original_coefficients(self, i: int) -> tuple[float, float]:
        self._check_step(i)
        return self.denoised[i - self.start_step]

    def __repr__(self) -> str:
        width = max(c.num_inputs for c in self.coefficients)
        start = f", from step {self.start_step}" if self.start_step else ""
        noise = ", with noise" if self._replay is not None else ""
        return (
            f"SolverTable({self.scheduler_name}, {self.num_steps} steps{start}, sigma "
            f"{float(self.sigmas[self.start_step]):.4g} -> {float(self.sigmas[-1]):.4g}, state of {width}{noise})"
        )

    def __str__(self) -> str:
        """One line a step: x' = sum of A z, B m and C eps."""
        lines = [repr(self), f"{'step':>4}  {'timestep':>9}  {'sigma':>9}  {'input':>7}  next latents"]
        for i in range(self.start_step, self.num_steps):
            row = self.step_coefficients(i)
            names = ["x", *(f"h{k}" for k in range(1, row.num_inputs)), "m", *(f"eps{k}" for k in range(row.num_noise))]
            values = (*row.A[0], row.B[0], *row.C[0])
            terms = " ".join(f"{value:+.6g} {name}" for value, name in zip(values, names, strict=True) if value != 0)
            scale = self.input_scales[i - self.start_step]
            lines.append(
                f"{i:>4}  {float(self.timesteps[i]):>9.4g}  {float(self.sigmas[i]):>9.4g}  {scale:>7.4g}  {terms}"
            )
        return "\n".join(lines)
