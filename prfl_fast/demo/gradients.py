"""The report's table of gradient modes: calls, seconds, peak memory and agreement with the exact gradient, measured."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import prfl_fast
from prfl_fast.demo.net import prompt
from prfl_fast.demo.rewards import latent_logits
from prfl_fast.demo.sample import STEPS, make_scheduler
from prfl_fast.sampling.compare import gradient_agreement, measure_gradient

MODES = {
    "full": "full chain",
    "last:4": "last 4 steps",
    "last:1": "last step",
    f"step:{STEPS // 2}": f"one step (number {STEPS // 2})",
}


def gradient_table(net: nn.Module, reward: nn.Module, noise: Tensor) -> list[dict[str, Any]]:
    """One row per mode, the exact gradient first and plain autograd last, for the mean reward of ``noise`` [B, ...]."""
    parameters = [p for p in net.parameters() if p.requires_grad]

    def chain(mode: str) -> Callable[[], int]:
        def backward() -> int:
            sample = prfl_fast.unrolled_sample(
                net, make_scheduler(), noise, STEPS, conditioning=prompt(len(noise)), gradient=mode
            )
            latent_logits(reward, sample.latents, sample.timestep).mean().backward()
            return sample.network_calls

        return backward

    def plain() -> int:
        scheduler = make_scheduler()
        scheduler.set_timesteps(STEPS)
        x = noise
        for t in scheduler.timesteps:
            velocity = net(x, t.expand(len(x)), **prompt(len(x)), return_dict=False)[0]
            x = scheduler.step(velocity, t, x, return_dict=False)[0]
        latent_logits(reward, x, torch.zeros(())).mean().backward()
        return STEPS

    rows: list[dict[str, Any]] = []
    exact: list[Tensor | None] = []
    for label, backward in [*((label, chain(mode)) for mode, label in MODES.items()), ("plain autograd", plain)]:
        gradients, calls, seconds, peak = measure_gradient(parameters, backward, noise.device)
        exact = exact or gradients
        cosine, ratio = gradient_agreement(gradients, exact)
        rows.append(
            {
                "mode": label,
                "calls": calls,
                "seconds": seconds,
                "peak_bytes": peak,
                "cosine": cosine,
                "norm_ratio": ratio,
            }
        )
    return rows
