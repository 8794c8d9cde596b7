"""What the door hands to the chain: one frozen, validated request, in which nothing is left to decide."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prfl_fast.memory.plan import MemoryPlan
from prfl_fast.sampling.guidance import Guidance, StepNetwork
from prfl_fast.sampling.modes import GeneratorLike, ResolvedMode
from prfl_fast.solvers.base import Solver

PrepareInput = Callable[[Tensor, Tensor, int], dict[str, Any]]
Conditioning = dict[str, Any]


@dataclass(frozen=True, eq=False)
class Request:
    """One chain. ``networks``, ``conditioning`` and ``negative`` hold one entry per step, from the first step of the
    chain on; ``timesteps`` [num_steps] lies on the latents' device."""

    latents: Tensor
    solver: Solver
    timesteps: Tensor
    start_step: int
    mode: ResolvedMode
    networks: tuple[StepNetwork, ...]
    conditioning: tuple[Conditioning, ...]
    negative: tuple[Conditioning, ...]
    guidance: Guidance
    prepare_input: PrepareInput | None
    latent_mask: Tensor | None
    plan: MemoryPlan
    modules: tuple[nn.Module, ...]
    generator: GeneratorLike
    verify_recompute: bool
    detect_nonfinite: bool
    progress: bool

    @property
    def last_step(self) -> int:
        """Number of steps taken when the rollout ends: the last tap."""
        return self.mode.taps[-1]

    def timestep_after(self, steps: int) -> Tensor:
        """Timestep of the call that would follow after ``steps`` steps; 0 after the last one."""
        if steps < len(self.timesteps):
            return self.timesteps[steps]
        return torch.zeros((), dtype=self.timesteps.dtype, device=self.timesteps.device)

    def differentiated(self, step: int) -> bool:
        """True where some tap gives this step's network call a weight."""
        return any(
            step < tap and not self.mode.weights(k, step).zero for k, tap in enumerate(self.mode.taps)
        )
