"""Classifier-free guidance (arXiv 2207.12598) and Wan 2.2's two experts: which network, which scale, in which step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from prfl_fast.models.base import Adapter

GuidanceFunction = Callable[[Tensor, Tensor, int], Tensor]


@dataclass(frozen=True)
class StepNetwork:
    """What one step calls: the network's ``adapter``, its guidance ``scale`` (1: one call), and whether both branches
    run."""

    adapter: Adapter
    scale: float
    guided: bool


@dataclass(frozen=True)
class Guidance:
    """How the two predictions of a step become one."""

    function: GuidanceFunction | None
    both_branches: bool  # False: the unconditional branch is a constant in the backward

    def combine(self, conditional: Tensor, unconditional: Tensor, scale: float, step: int) -> Tensor:
        """``u + s (c - u)``, in the grouping that diffusers' pipelines use (others differ in the last bits)."""
        if self.function is not None:
            return self.function(conditional, unconditional, step)
        return unconditional + scale * (conditional - unconditional)
