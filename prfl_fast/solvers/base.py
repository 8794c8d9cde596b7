"""What a chain needs of a solver."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

GeneratorLike = torch.Generator | Sequence[torch.Generator] | None


class NonlinearSchedulerError(ValueError):
    """The scheduler's step is not linear in its state and the network's output, so there is no table of it."""


class NonFiniteSchedulerError(NonlinearSchedulerError):
    """The scheduler's step gives NaN or infinity for finite input: with these settings it can't sample at all."""


class Solver(ABC):
    """A scheduler with fixed timesteps, as pure functions of explicit state.

    One step is one entry of the scheduler's timesteps, that is one evaluation of the network per guidance branch (a
    two-evaluation method such as Heun's lists both). Steps are numbered as the timesteps are; a solver made with
    ``start_step=s`` begins at s, with an empty history.

    Attributes:
        num_steps: N, the number of timesteps.
        start_step: the first step that can be run.
        timesteps: ``[N]`` on the CPU, dtype as the scheduler's own.
        sigmas: ``[N + 1]`` float64 on the CPU, the noise level before each step and after the last one, in the
            scheduler's convention: flow sigma in 0..1, sigma of ``x = x0 + sigma eps``, or ``sqrt((1 - abar) / abar)``
            for schedulers that know alpha-bar only.
        linear: the step is a fixed linear map: ``pullback`` ignores values, and both take guidance's two outputs.
    """

    num_steps: int
    start_step: int
    timesteps: Tensor
    sigmas: Tensor
    linear: bool

    @abstractmethod
    def initial_state(self, latents: Tensor) -> tuple[Tensor, ...]:
        """State for the first step; entry 0 is x."""

    @abstractmethod
    def scale_input(self, i: int, x: Tensor) -> Tensor:
        """The network's input for x in step i (the scheduler's ``scale_model_input``)."""

    @abstractmethod
    def draw_noise(
        self, i: int, like: Tensor, generator: GeneratorLike, *, model_dtype: torch.dtype | None = None
    ) -> tuple[Tensor, ...]:
        """The draws that the scheduler makes in step i: same order, shape, dtype and generator use. Usually empty.

        Args:
            i: the step.
            like: the latents x (shape, dtype, device).
            generator: as for the scheduler's ``step``: one, one per sample, or None for the global one.
            model_dtype: dtype of the network's output where it is not that of ``like`` (some schedulers draw in it).
        """

    @abstractmethod
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
        """State after step i (it may have another number of entries): a pure, differentiable function.

        With ``unconditional``, which a linear solver alone takes, ``model_output`` is guidance's conditional branch:
        the network's output is ``u + guidance_scale (c - u)``, computed in the dtype of the two.
        """

    @abstractmethod
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
        """Cotangents of step i's state and of its network outputs, from those of its result.

        None is zero, in and out; missing cotangents at the end are zero. A linear solver needs neither ``state`` nor
        ``model_output`` nor ``noise``.

        Args:
            i, state, model_output, noise, latent_mask, guidance_scale: as in the forward.
            cotangents: one per entry of the state after the step.
            output_dtypes: of the outputs' cotangents: empty where none is wanted, two (the conditional one's first)
                from a linear solver whose forward had both; None: one, in the dtype of the solver's arithmetic.
        """

    @abstractmethod
    def original_coefficients(self, i: int) -> tuple[float, float]:
        """(a, b) of the denoised prediction ``x0 = a x + b m`` in step i, x being the unscaled latents.

        Both NaN where the scheduler tells neither the prediction nor what its network predicts.
        """

    def _check_step(self, i: int) -> None:
        if not self.start_step <= i < self.num_steps:
            raise IndexError(f"i: expected a step in {self.start_step}..{self.num_steps - 1}, got {i}")
