"""Exact reward gradients through the whole sampling chain of a video diffusion transformer, in bounded memory.

The drop-in call is :func:`unrolled_sample`; :class:`LatentRewardModel` scores a noisy latent at any noise level.
Names are imported on first use, so that ``import prfl_fast`` costs next to nothing beyond torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from prfl_fast.memory.plan import InfeasibleBudget, MemoryPlan
    from prfl_fast.models.fused import fuse, unfuse
    from prfl_fast.pixels import PixelDecoder
    from prfl_fast.reward import (
        LatentRewardModel,
        QueryAttentionPool,
        bradley_terry_loss,
        reward_bce_loss,
        reward_feedback_loss,
    )
    from prfl_fast.sampling.compare import compare_gradients
    from prfl_fast.sampling.door import unrolled_sample
    from prfl_fast.sampling.guard import ModelChangedError
    from prfl_fast.sampling.modes import GradientMode
    from prfl_fast.sampling.pipeline_inputs import pipeline_inputs
    from prfl_fast.sampling.planning import plan_memory
    from prfl_fast.sampling.sample import Sample, Tap
    from prfl_fast.solvers import NonlinearSchedulerError, SolverTable

_HOME = {
    "GradientMode": "prfl_fast.sampling.modes",
    "InfeasibleBudget": "prfl_fast.memory.plan",
    "LatentRewardModel": "prfl_fast.reward",
    "MemoryPlan": "prfl_fast.memory.plan",
    "ModelChangedError": "prfl_fast.sampling.guard",
    "NonlinearSchedulerError": "prfl_fast.solvers",
    "PixelDecoder": "prfl_fast.pixels",
    "QueryAttentionPool": "prfl_fast.reward",
    "Sample": "prfl_fast.sampling.sample",
    "SolverTable": "prfl_fast.solvers",
    "Tap": "prfl_fast.sampling.sample",
    "bradley_terry_loss": "prfl_fast.reward",
    "compare_gradients": "prfl_fast.sampling.compare",
    "fuse": "prfl_fast.models.fused",
    "pipeline_inputs": "prfl_fast.sampling.pipeline_inputs",
    "plan_memory": "prfl_fast.sampling.planning",
    "reward_bce_loss": "prfl_fast.reward",
    "reward_feedback_loss": "prfl_fast.reward",
    "unfuse": "prfl_fast.models.fused",
    "unrolled_sample": "prfl_fast.sampling.door",
}

__all__ = [
    "GradientMode",
    "InfeasibleBudget",
    "LatentRewardModel",
    "MemoryPlan",
    "ModelChangedError",
    "NonlinearSchedulerError",
    "PixelDecoder",
    "QueryAttentionPool",
    "Sample",
    "SolverTable",
    "Tap",
    "bradley_terry_loss",
    "compare_gradients",
    "fuse",
    "pipeline_inputs",
    "plan_memory",
    "reward_bce_loss",
    "reward_feedback_loss",
    "unfuse",
    "unrolled_sample",
]


def __getattr__(name: str) -> Any:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module 'prfl_fast' has no attribute {name!r}")
    value = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
