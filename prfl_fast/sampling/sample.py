"""What ``unrolled_sample`` gives back."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from prfl_fast.memory.plan import MemoryPlan
from prfl_fast.pixels import Decode, module_of
from prfl_fast.sampling.guard import ModelGuard
from prfl_fast.sampling.nodes import root
from prfl_fast.sampling.run import Run

if TYPE_CHECKING:
    from prfl_fast.sampling.steps import StepTape

TapLoss = Callable[[Tensor, Tensor, int], Tensor]


@dataclass(frozen=True, eq=False)
class Tap:
    """The latent after ``step`` steps.

    Attributes:
        latents: in the layout of the initial latents.
        timestep: 0-dimensional; that of the next network call, 0 after the last: what a process reward needs.
        sigma: noise level of these latents.
        step: number of steps taken.
    """

    latents: Tensor
    timestep: Tensor
    sigma: float
    step: int


@dataclass(frozen=True, eq=False)
class Sample:
    """The end of the chain, its taps, and the way back.

    ``latents, timestep, sigma, step`` are those of the last tap. With ``graph="chain"`` they are part of an ordinary
    autograd graph; with ``graph="steps"`` they are leaves, and :meth:`backward` carries their gradient through the
    chain.
    """

    taps: tuple[Tap, ...]
    plan: MemoryPlan
    gradient_mode: str
    _run: Run = field(repr=False)
    _last_input: Tensor = field(repr=False)
    _last_prediction: Tensor = field(repr=False)
    _original: tuple[float, float] = field(repr=False)
    _tape: StepTape | None = field(default=None, repr=False)
    _decode: Decode | None = field(default=None, repr=False)

    @property
    def latents(self) -> Tensor:
        """Latents of the last tap."""
        return self.taps[-1].latents

    @property
    def timestep(self) -> Tensor:
        """Timestep of the call that would come next; 0 after the last."""
        return self.taps[-1].timestep

    @property
    def sigma(self) -> float:
        """Noise level of ``latents``."""
        return self.taps[-1].sigma

    @property
    def step(self) -> int:
        """Number of steps taken."""
        return self.taps[-1].step

    @property
    def pred_original_sample(self) -> Tensor:
        """The clean latent that the last network call predicts, from its input and output; with ``graph="chain"`` it
        carries a gradient as ``latents`` does.

        Raises:
            RuntimeError: the scheduler tells neither this prediction nor what its network predicts.
        """
        a, b = self._original
        if math.isnan(a):
            raise RuntimeError("pred_original_sample: the scheduler does not tell what its network predicts")
        original = a * self._last_input + b * self._last_prediction
        return root(original, self._run) if original.requires_grad else original

    @property
    def frames(self) -> Tensor:
        """[B, C, T, H, W] in 0..1: ``latents`` decoded by ``decode=``, with a gradient wherever ``latents`` has one.

        Decoded anew at each access: keep it in a variable.
        """
        return self.decode(self.latents)

    def decode(self, latents: Tensor) -> Tensor:
        """Frames of any latents of this chain's layout by ``decode=``: those of a tap, or ``pred_original_sample``, the
        clean video as one step predicts it (RGB ReFL, arXiv 2304.05977, rewards that).

        Raises:
            RuntimeError: the chain was sampled without ``decode=``.
        """
        if self._decode is None:
            raise RuntimeError("frames: the chain has no decoder; call unrolled_sample(..., decode=pipe.vae)")
        frames = self._decode(latents)
        module = module_of(self._decode)
        if module is not None and frames.requires_grad:
            # Chunks are computed again in the backward, so the decoder must still be the one that decoded.
            guard = ModelGuard([module])
            frames.register_hook(lambda _: guard.check())
        return frames

    @property
    def gradient_norms(self) -> Tensor:
        """[number of steps] float64: 2-norm of the gradient that reached the (guided) prediction of each step in the
        last backward; NaN where none did. Where the gradients of several taps reach a step apart, the root of the sum
        of their squares. Where the solver's step combines guidance's branches it is told from one of theirs, so it is
        good to the rounding of their dtype."""
        return self._run.gradient_norms()

    @property
    def network_calls(self) -> int:
        """Evaluations of the network so far, recomputations counted in."""
        return self._run.network_calls

    def backward(self, gradient: Tensor | Sequence[Tensor | None] | TapLoss | None = None) -> Tensor | None:
        """Only for ``graph="steps"``: walks the chain backwards, one backward per step.

        Args:
            gradient: None: the ``.grad`` that ``loss.backward()`` left on the taps' latents. A tensor: the gradient
                of the last tap's latents; a sequence: one per tap. A function ``(latents, timestep, step) -> loss``:
                called as the sweep reaches each tap, so that one reward's graph lives at a time. With ``decode=`` it
                is given that tap's frames in place of its latents.

        Returns:
            The summed loss (detached) when a function was given, else None.

        Raises:
            RuntimeError: for ``graph="chain"``, for a second call, or when no tap has a gradient.
            ModelChangedError: the model changed since it sampled.
        """
        if self._tape is None:
            raise RuntimeError(
                "sample.backward() is for graph='steps'; with graph='chain' call loss.backward() on your loss"
            )
        if torch.is_inference_mode_enabled():
            raise RuntimeError("sample.backward() can't run in inference mode")
        if callable(gradient) and self._decode is not None:
            gradient = self._on_frames(gradient)
        return self._tape.backward(self.taps, gradient)

    def _on_frames(self, loss: TapLoss) -> TapLoss:
        return lambda latents, timestep, step: loss(self.decode(latents), timestep, step)
