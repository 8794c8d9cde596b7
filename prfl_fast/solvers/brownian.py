"""Schedulers that read their noise off a Brownian tree (torchsde) instead of drawing it from a generator.

A tree of one seed gives the same path whatever is asked and in whatever order, so a step's noise is a function of the
seed and the step's interval of noise levels: ``(W(b) - W(a)) / sqrt(|b - a|)``. Inside a private scheduler a standard
normal draw stands for it; :func:`tree_noise` gives the scheduler's own.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from prfl_fast.solvers.refused import refuse_missing_seed

Interval = tuple[Tensor, Tensor]


class StandIn:
    """In the place of diffusers' ``BrownianTreeNoiseSampler``; leaves the interval asked for in ``scheduler.asked``."""

    def __init__(self, scheduler: Any, like: Tensor) -> None:
        self._scheduler, self._like = scheduler, like

    def __call__(self, before: Tensor, after: Tensor) -> Tensor:
        self._scheduler.asked = (before, after)
        noise = torch.randn_like(self._like)
        # diffusers' trees resolve 1e-6; over less they give 0 / 0 or never end.
        return torch.full_like(noise, torch.nan) if bool((before - after).abs() <= 1e-6) else noise


def tree_noise(
    scheduler: Any, interval: Interval, shape: torch.Size, dtype: torch.dtype, device: torch.device, generator: Any
) -> Tensor:
    """The scheduler's own noise over ``interval``, of a tree of its seed.

    Raises:
        ValueError: no generator, where the tree's seed comes from it.
    """
    origin = next(kind for kind in type(scheduler).__mro__ if kind.__module__.startswith("diffusers."))
    # The module of the scheduler has the sampler that it uses.
    sampler = sys.modules[origin.__module__].BrownianTreeNoiseSampler
    if origin.__name__ == "CosineDPMSolverMultistepScheduler":
        refuse_missing_seed(scheduler, generator)
        low, high, seed = scheduler.config.sigma_min, scheduler.config.sigma_max, _seed_of(generator)
    else:
        sigmas = scheduler.sigmas
        low, high, seed = sigmas[sigmas > 0].min().item(), sigmas.max().item(), scheduler.noise_sampler_seed
    noise: Tensor = sampler(torch.zeros(shape, dtype=dtype, device=device), low, high, seed)(*interval)
    return noise


def _seed_of(generator: torch.Generator | Sequence[torch.Generator]) -> int | list[int]:
    if isinstance(generator, torch.Generator):
        return generator.initial_seed()
    return [one.initial_seed() for one in generator]
