"""Classifier-free guidance (arXiv 2207.12598) and Wan 2.2's two experts: which network, which scale, in which step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce

import torch
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


@dataclass(frozen=True, eq=False)
class Prediction:
    """What the network says in one step: ``output``, or guidance's two branches, of which ``output`` is the conditional
    one, where the solver's step combines them itself."""

    output: Tensor
    unconditional: Tensor | None = None
    scale: float = 1.0

    @property
    def branches(self) -> tuple[Tensor, ...]:
        """The tensors, one or two."""
        return (self.output,) if self.unconditional is None else (self.output, self.unconditional)

    @property
    def shares(self) -> tuple[float, ...]:
        """How much of the combined prediction's gradient each branch is given."""
        return (1.0,) if self.unconditional is None else (self.scale, 1 - self.scale)

    @property
    def dtype(self) -> torch.dtype:
        """Of the combined prediction."""
        return reduce(torch.promote_types, (branch.dtype for branch in self.branches))

    @property
    def requires_grad(self) -> bool:
        """Whether some branch does."""
        return any(branch.requires_grad for branch in self.branches)

    def of(self, branches: Sequence[Tensor]) -> Prediction:
        """The same with other tensors in the branches' places."""
        output, *others = branches
        return Prediction(output, others[0] if others else None, self.scale)

    def detach(self) -> Prediction:
        """The same, cut from the graph."""
        return self.of([branch.detach() for branch in self.branches])

    def combined(self) -> Tensor:
        """``u + s (c - u)``, in the grouping that diffusers' pipelines use (others differ in the last bits)."""
        if self.unconditional is None:
            return self.output
        return self.unconditional + self.scale * (self.output - self.unconditional)


@dataclass(frozen=True)
class Guidance:
    """How the two predictions of a step become one."""

    function: GuidanceFunction | None
    both_branches: bool  # False: the unconditional branch is a constant in the backward

    def predict(
        self, conditional: Tensor, unconditional: Tensor, scale: float, step: int, *, fused: bool
    ) -> Prediction:
        """The prediction of the two branches; ``fused``: left to the solver's step, where that is its own formula."""
        if self.function is not None:
            return Prediction(self.function(conditional, unconditional, step))
        both = Prediction(conditional, unconditional, scale)
        # A scale of 0 leaves nothing of the conditional branch from which the prediction's gradient could be told.
        return both if fused and scale != 0 else Prediction(both.combined())
