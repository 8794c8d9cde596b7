"""Pruned steps give the same latents from fewer tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from prfl_fast.ops import StepCoefficients, solver_step
from prfl_fast.solvers.pruning import prune


def chain(steps: Sequence[StepCoefficients], x: Tensor, outputs: Tensor, mask: Tensor | None = None) -> list[Tensor]:
    state, latents = (x,), []
    for step, m in zip(steps, outputs, strict=True):
        state = solver_step(state, (m,), step, latent_mask=mask)
        latents.append(state[0])
    return latents


def step(rows: Sequence[Sequence[float]]) -> StepCoefficients:
    """Rows of A with B as last number."""
    return StepCoefficients(tuple(tuple(r[:-1]) for r in rows), tuple(r[-1] for r in rows), ((),) * len(rows))


def widths(steps: Sequence[StepCoefficients]) -> list[int]:
    return [s.num_inputs for s in steps] + [steps[-1].num_outputs]


# Powers of two: every sum is exact in float64, so that equal means equal.
TWINS = [
    step([(2.0, 1.0), (1.0, 4.0), (1.0, 4.0), (1.0, 4.0)]),
    step([(1.0, 2.0, 4.0, 8.0, 1.0), (0.0, 1.0, 0.0, 0.0, 0.0), (0.0, 0.0, 1.0, 0.0, 0.0)]),
    step([(1.0, 0.5, 0.25, 2.0)]),
]
UNREAD = [
    step([(2.0, 1.0), (1.0, 4.0), (8.0, 2.0)]),
    step([(1.0, 2.0, 0.0, 1.0), (0.0, 0.0, 1.0, 1.0), (0.0, 1.0, 1.0, 0.0)]),
    step([(1.0, 0.0, 0.5, 2.0), (1.0, 1.0, 1.0, 1.0)]),
]
# Entry 1 equals the latents as long as no mask holds them.
SHADOW = [step([(2.0, 1.0), (2.0, 1.0)]), step([(0.0, 1.0, 1.0)])]


def integers(*shape: int) -> Tensor:
    return torch.randint(-8, 9, shape).double()


def test_the_latents_stay_the_same() -> None:
    mask = torch.rand(5) < 0.5
    for steps in (TWINS, UNREAD, SHADOW):
        x, outputs = integers(5), integers(len(steps), 5)
        for given in (None, mask):
            expected, actual = chain(steps, x, outputs, given), chain(prune(steps), x, outputs, given)
            assert all(a.equal(b) for a, b in zip(actual, expected, strict=True))


def test_twins_are_kept_once() -> None:
    assert widths(TWINS) == [1, 4, 3, 1] and widths(prune(TWINS)) == [1, 2, 2, 1]


def test_what_no_later_step_reads_is_dropped() -> None:
    assert widths(UNREAD) == [1, 3, 3, 2] and widths(prune(UNREAD)) == [1, 3, 2, 1]


def test_the_latents_are_no_ones_twin() -> None:
    assert widths(prune(SHADOW)) == [1, 2, 1]
