"""The few nodes that a chain puts into the autograd graph: identities in the forward, duties in the backward."""

from __future__ import annotations

from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from prfl_fast.sampling.guidance import Prediction
from prfl_fast.sampling.run import Backward, Run


class _End:
    """Ends a backward, whichever way it goes.

    The autograd engine calls it when the whole backward is through, and drops it uncalled when anything in that
    backward has raised: a kernel out of memory, a hook of the user's, Ctrl-C.
    """

    def __init__(self, backward: Backward) -> None:
        self._backward: Backward | None = backward

    def __call__(self) -> None:
        backward, self._backward = self._backward, None
        if backward is not None:
            backward.end()

    def __del__(self) -> None:
        if self._backward is not None:
            self._backward.fail()


# The engine's passes that are under way, by its own number: the only thing that two chains in one backward share.
# Held by their _End alone.
_PASSES: WeakValueDictionary[int, Backward] = WeakValueDictionary()


def _join_backward(run: Run) -> None:
    """Begins the run's part in the pass of the engine that is under way; a second tap of it finds it begun."""
    task = torch._C._current_graph_task_id()
    backward = _PASSES.get(task)
    if backward is None:
        backward = _PASSES[task] = Backward()
        torch.autograd.Variable._execution_engine.queue_callback(_End(backward))
    backward.begin(run)


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
        _join_backward(run)
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
