"""What one chain shares between its forward and its backward: guard, gradients' transaction, norms, progress.

A run has a forward and any number of backwards (``retain_graph``). Its parts are reached from the nodes that the chain
puts into the autograd graph (nodes.py) and from the network calls (calls.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import _StopRecomputationError
from tqdm import tqdm

from prfl_fast.sampling.guard import ModelGuard
from prfl_fast.sampling.recovery import recover, refuse_left_half_way
from prfl_fast.sampling.request import Request
from prfl_fast.sampling.transaction import GradientTransaction


class Backward:
    """One backward and the runs that it walks: several where losses of several samples were summed.

    Runs begin one after the other, and a leaf that they share may hold a part of the gradient before the second one
    begins. So they fail together, and the one that began first puts its gradients back last.
    """

    def __init__(self) -> None:
        self._runs: list[Run] = []

    def begin(self, run: Run) -> None:
        """The backward has reached a run; nothing happens when it reaches it again at another tap."""
        if run.backward is not self:
            run.begin_backward(self)
            self._runs.append(run)

    def end(self) -> None:
        """The backward went through."""
        for run in self._runs:
            if run.backward is self:
                run.end_backward()

    def fail(self) -> None:
        """The backward was left by an exception: every `.grad` is put back."""
        for run in reversed(self._runs):
            if run.backward is self:
                run.fail_backward()


class Run:
    """State of one chain; see the module's text."""

    def __init__(self, request: Request) -> None:
        networks = {id(n): n for n in (network.adapter.network for network in request.networks)}
        self._networks = [n for n in networks.values() if isinstance(n, nn.Module)]
        refuse_left_half_way(self._networks)
        self.guard = ModelGuard(request.modules)
        self._transaction = GradientTransaction(_leaves(request))
        self._squared_norms: dict[int, Tensor] = {}
        self._num_steps = request.solver.num_steps
        self._backward_steps = sum(request.differentiated(i) for i in range(request.start_step, request.last_step))
        self._show = request.progress
        self._bar: tqdm[Any] | None = None
        self.backward: Backward | None = None
        self.network_calls = 0

    @property
    def in_backward(self) -> bool:
        """Whether a backward is under way."""
        return self.backward is not None

    def begin_backward(self, backward: Backward) -> None:
        """First thing in every backward: the model must be as it was, and `.grad` is remembered."""
        self._close()  # one that ended without a word
        self.guard.check()
        self._transaction.begin()
        self._squared_norms.clear()
        self.backward = backward
        if self._show:
            self._bar = tqdm(total=self._backward_steps, desc="backward", unit="step")

    def end_backward(self) -> None:
        """The backward went through."""
        self._transaction.commit()
        self._close()

    def fail_backward(self) -> None:
        """The backward was left by an exception: `.grad` is put back."""
        self._transaction.rollback()
        recover(self._networks)
        self._close()

    def _close(self) -> None:
        self.backward = None
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    @contextmanager
    def undoing(self) -> Iterator[None]:
        """Around a network call, in the forward and inside a backward: whatever leaves it undoes the backward."""
        try:
            yield
        except _StopRecomputationError:
            raise  # torch's checkpoint has all that it needs: the recomputation ends early, nothing has failed
        except BaseException:
            if self.backward is not None:
                self.backward.fail()
            else:
                recover(self._networks)
            raise

    def record(self, step: int, gradients: Sequence[Tensor | None], shares: Sequence[float]) -> None:
        """Notes the gradient g that reaches the prediction of a step, given as its ``shares`` s g, one a branch, of
        which the largest tells it best; nothing is synchronised with the device."""
        told = [(abs(s), g) for s, g in zip(shares, gradients, strict=True) if g is not None]
        if not told:
            return
        share, gradient = max(told, key=lambda pair: pair[0])
        # One float64 copy at a time: it is the largest tensor that a backward has beside the network's own.
        squared = (torch.linalg.vector_norm(gradient.detach().double()) / share).square()
        previous = self._squared_norms.get(step)
        self._squared_norms[step] = squared if previous is None else previous + squared
        if self._bar is not None and previous is None:
            self._bar.update()

    def gradient_norms(self) -> Tensor:
        """[num_steps] float64 on the CPU, NaN where no gradient reached the network."""
        norms = torch.full((self._num_steps,), float("nan"), dtype=torch.float64)
        for step, squared in self._squared_norms.items():
            norms[step] = squared.sqrt().item()
        return norms


def _leaves(request: Request) -> Iterator[Tensor]:
    """Every leaf whose `.grad` a backward of this chain can touch."""
    seen: set[int] = set()
    candidates: list[object] = [request.latents]
    candidates.extend(tree_leaves([*request.conditioning, *request.negative]))
    for module in request.modules:
        candidates.extend(module.parameters())
    for value in candidates:
        if isinstance(value, Tensor) and id(value) not in seen:
            seen.add(id(value))
            yield value
