"""Noise levels of a schedule, and the denoised prediction as configured, where the scheduler does not tell it."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from prfl_fast.solvers.replay import Replay

_UNKNOWN = (math.nan, math.nan)

# Flow matching by the code of their step alone: no setting says so. MiniMax-H3's velocity points from noise to data.
_VELOCITIES = {"LTXEulerAncestralRFScheduler": -1.0, "MiniMaxH3Scheduler": 1.0}

# Of those that know alpha-bar only: the last step gives the denoised prediction, or goes to the first timestep.
_ENDS_CLEAN = ("DDPMScheduler", "DDPMParallelScheduler", "LCMScheduler", "UnCLIPScheduler")
_ENDS_AT_THE_FIRST_TIMESTEP = ("TCDScheduler",)


def noise_levels(replay: Replay) -> Tensor:
    """``[N + 1]`` float64: the noise level before each step and after the last; see :class:`Solver`.

    NaN for a scheduler that has neither sigmas nor alpha-bar.
    """
    scheduler, count = replay.scheduler, replay.num_steps
    sigmas = getattr(scheduler, "sigmas", None)
    if sigmas is not None and len(sigmas) >= replay.offset + count + 1:
        levels = torch.as_tensor(sigmas).detach().to("cpu", torch.float64, copy=True)
        return levels[replay.offset : replay.offset + count + 1]
    alphas = getattr(scheduler, "alphas_cumprod", None)
    if alphas is None or replay.timesteps.is_floating_point():
        return torch.full((count + 1,), math.nan, dtype=torch.float64)
    bars = alphas.double()[replay.timesteps.long()]
    last = torch.as_tensor(_last_alpha_bar(scheduler, alphas, int(replay.timesteps[-1])))
    bars = torch.cat([bars, last.double().reshape(1)])
    return ((1 - bars) / bars).sqrt()


def _last_alpha_bar(scheduler: Any, alphas: Tensor, timestep: int) -> Any:
    """Where a scheduler goes from its last timestep: one stride on or off the end of its table, if not said above."""
    names = {kind.__name__ for kind in type(scheduler).__mro__}
    if not names.isdisjoint(_ENDS_CLEAN):
        return 1.0
    if not names.isdisjoint(_ENDS_AT_THE_FIRST_TIMESTEP):
        return alphas[0]
    after = timestep - len(alphas) // int(scheduler.num_inference_steps)
    return alphas[after] if after >= 0 else getattr(scheduler, "final_alpha_cumprod", 1.0)


def denoised_prediction(scheduler: Any, sigma: float, input_scale: float) -> tuple[float, float]:
    """(a, b) of ``x0 = a x + b m`` from the configured prediction type; NaN where it does not say enough.

    The latents are ``(1 - sigma) x0 + sigma eps`` for flow matching, ``x0 + sigma eps`` for schedulers that scale the
    network's input by ``(sigma^2 + 1)^(-1/2)``, and ``(x0 + sigma eps) (sigma^2 + 1)^(-1/2)`` for the others.
    """
    config = scheduler.config
    name = type(scheduler).__name__
    if name in _VELOCITIES:
        return 1.0, _VELOCITIES[name] * sigma
    precondition = getattr(scheduler, "precondition_outputs", None)
    if callable(precondition):  # EDM
        one, zero = torch.ones((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
        return float(precondition(one, zero, sigma)), float(precondition(zero, one, sigma))
    kind = config.get("prediction_type")
    if kind == "flow_prediction" or (kind is None and hasattr(scheduler, "scale_noise")):
        # Mochi's sigmas run from 0 (noise) to 1 (clean); the path is straight in both.
        return 1.0, (1.0 if config.get("invert_sigmas") else 0.0) - sigma
    if kind == "sample":
        return 0.0, 1.0
    if kind not in ("epsilon", "v_prediction"):
        return _UNKNOWN
    alpha = 1 / math.hypot(1.0, sigma)
    share = 1.0 if math.isinf(sigma) else sigma * alpha
    if input_scale == 1:
        if kind == "v_prediction":
            return alpha, -share
        return (1 / alpha, -share / alpha) if alpha else _UNKNOWN
    # The scheduler rounds its own scale to float32.
    if abs(input_scale - alpha) > 2.0**-20 * alpha:
        return _UNKNOWN
    return (1.0, -sigma) if kind == "epsilon" else (alpha**2, -share)
