"""Schedulers whose ``step`` is called otherwise, given the call ``step(model_output, timestep, sample)`` of the others.

What their pipelines hand from step to step becomes run state of the scheduler: a latent-shaped tensor there is an entry
of the solver's state like any other history. The class is derived for the private copy, the user's scheduler keeps its
own.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from prfl_fast.solvers.brownian import StandIn


class StepOutput(NamedTuple):
    """What an adapted step gives: a tuple, as with ``return_dict=False``, whose entries have diffusers' names."""

    prev_sample: Tensor
    pred_original_sample: Tensor


def _cogvideox_dpm(kind: Any) -> Any:
    """CogVideoX's DPM-Solver++: second order, its last denoised prediction and timestep kept by the pipeline."""

    def step(self: Any, model_output: Tensor, timestep: Tensor, sample: Tensor, generator: Any = None) -> StepOutput:
        old, back = getattr(self, "old_pred_original_sample", None), getattr(self, "timestep_back", None)
        latents, original = kind.step(self, model_output, old, timestep, back, sample, generator=generator)
        self.old_pred_original_sample, self.timestep_back = original, timestep
        return StepOutput(latents, original)

    return step


def _unclip(kind: Any) -> Any:
    """UnCLIP goes to the timestep before, whatever the schedule, unless its pipeline says where to."""

    def step(self: Any, model_output: Tensor, timestep: Tensor, sample: Tensor, generator: Any = None) -> StepOutput:
        after = int((self.timesteps == timestep).nonzero()[0]) + 1
        target = self.timesteps[after] if after < len(self.timesteps) else None
        given = {"prev_timestep": target, "generator": generator, "return_dict": False}
        return StepOutput(*kind.step(self, model_output, timestep, sample, **given))

    return step


def _with_tree(kind: Any) -> Any:
    """Noise of a Brownian tree, in the dtype that the scheduler makes the tree in; see :mod:`brownian`."""
    of_output = _stepping(kind) == "CosineDPMSolverMultistepScheduler"

    def step(self: Any, model_output: Tensor, timestep: Tensor, sample: Tensor, return_dict: bool = True) -> Any:
        dtype = torch.result_type(sample, model_output) if of_output else sample.dtype
        self.noise_sampler = StandIn(self, sample.detach().to(dtype))
        try:
            return kind.step(self, model_output, timestep, sample, return_dict=return_dict)
        finally:
            self.noise_sampler = None

    return step


_ADAPTERS: dict[str, Callable[[Any], Any]] = {
    "CogVideoXDPMScheduler": _cogvideox_dpm,
    "CosineDPMSolverMultistepScheduler": _with_tree,
    "DPMSolverSDEScheduler": _with_tree,
    "UnCLIPScheduler": _unclip,
}

# Their last timestep is where the last step ends, at which the network is not called.
_LISTS_THE_END = ("SCMScheduler",)


@cache
def adapted(kind: Any) -> Any:
    """``kind``, or a class of the same name derived from it whose step is called as the others' are."""
    name = _stepping(kind)
    if name not in _ADAPTERS:
        return kind
    return type(kind.__name__, (kind,), {"step": _ADAPTERS[name](kind), "__module__": kind.__module__})


def evaluations(kind: Any, count: int) -> int:
    """How many of ``count`` timesteps the network is called at."""
    return count - 1 if _stepping(kind) in _LISTS_THE_END else count


def _stepping(kind: Any) -> str:
    """Name of the class whose step it is; a subclass with its own is another scheduler."""
    return next((base.__name__ for base in kind.__mro__ if "step" in vars(base)), "")
