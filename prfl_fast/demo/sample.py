"""The demo's sampler: ten steps of UniPC on a shifted flow, Wan's own solver."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from prfl_fast.demo.net import prompt

STEPS = 10
SHIFT = 3.0


def make_scheduler() -> Any:
    """The scheduler of every rollout in the demo, timesteps not set."""
    from diffusers import UniPCMultistepScheduler

    return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=SHIFT)


def sample_latents(net: nn.Module, noise: Tensor, *, steps: int = STEPS, batch: int = 64) -> Tensor:
    """Latents ``[N, C, F, H, W]`` at noise level 0 from the initial latents ``noise``, without any gradient.

    Written as diffusers' own loop, apart from ``unrolled_sample``, so that what is judged is what a pipeline gives.
    """
    parts = []
    with torch.no_grad():
        for x in noise.split(batch):
            scheduler = make_scheduler()
            scheduler.set_timesteps(steps)
            for t in scheduler.timesteps:
                velocity = net(x, t.expand(len(x)), **prompt(len(x)), return_dict=False)[0]
                x = scheduler.step(velocity, t, x, return_dict=False)[0]
            parts.append(x)
    return torch.cat(parts)
