"""The few nodes that a chain puts into the autograd graph: identities in the forward, duties in the backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from prfl_fast.sampling.guidance import Prediction
from prfl_fast.sampling.run import Run


class _End:
    """Ends a run's backward, whichever way it goes.

    The autograd engine calls it when the whole backward is through, and drops it uncalled when anything in that
    backward has raised: a kernel out of memory, a hook of the user's, Ctrl-C.
    """

    def __init__(self, run: Run) -> None:
        self._run: Run | None = run
        self._task = run.backward_task

    def __call__(self) -> None:
        run, self._run = self._run, None
        if run is not None:
            run.end_backward()

    def __del__(self) -> None:
        if self._run is not None and self._run.backward_task == self._task:
            self._run.fail_backward()


class _Root(torch.autograd.Function):
    """Sits on a tap's latents: the first node of ours that a backward reaches."""

    @staticmethod
    def forward(ctx: Any, latents: Tensor, run: Run) -> Tensor:
        ctx.run = run
        return latents.view_as(latents)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        run: Run = ctx.run
        if torch.is_grad_enabled():
            raise RuntimeError(
                "create_graph=True is unsupported: the gradient through the sampling chain can't be differentiated "
                "again. Call backward or torch.autograd.grad without create_graph."
            )
        # Two taps in one backward begin it once; one that was left by an exception elsewhere does not count.
        task = torch._C._current_graph_task_id()
        if not run.in_backward or run.backward_task != task:
            run.begin_backward()
            run.backward_task = task
            torch.autograd.Variable._execution_engine.queue_callback(_End(run))
        return gradients[0], None


class _Prediction(torch.autograd.Function):
    """Sits on a step's prediction, on both branches where there are two: notes the gradient that reaches the network
    there."""

    @staticmethod
    def forward(ctx: Any, run: Run, step: int, shares: tuple[float, ...], *branches: Tensor) -> tuple[Tensor, ...]:
        ctx.run, ctx.step, ctx.shares = run, step, shares
        ctx.set_materialize_grads(False)
        return tuple(branch.view_as(branch) for branch in branches)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.run.record(ctx.step, gradients, ctx.shares)
        return (None, None, None, *gradients)


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] * ctx.factor, None


def root(latents: Tensor, run: Run) -> Tensor:
    """Identity; in the backward checks the guard and begins the gradients' transaction."""
    result: Tensor = _Root.apply(latents, run)  # type: ignore[no-untyped-call]
    return result


def prediction_node(prediction: Prediction, run: Run, step: int) -> Prediction:
    """Identity; in the backward records the gradient's norm."""
    placed = [k for k, branch in enumerate(prediction.branches) if branch.requires_grad]
    if not placed:
        return prediction
    branches = list(prediction.branches)
    shares = tuple(prediction.shares[k] for k in placed)
    made: tuple[Tensor, ...] = _Prediction.apply(  # type: ignore[no-untyped-call]
        run, step, shares, *(branches[k] for k in placed)
    )
    for k, branch in zip(placed, made, strict=True):
        branches[k] = branch
    return prediction.of(branches)


def scale_gradient(tensor: Tensor, factor: float) -> Tensor:
    """Identity whose gradient is multiplied by ``factor``."""
    if factor == 1 or not tensor.requires_grad:
        return tensor
    result: Tensor = _ScaleGradient.apply(tensor, factor)  # type: ignore[no-untyped-call]
    return result
