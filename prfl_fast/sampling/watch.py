"""Looking into a network call, block by block: non-finite values and recomputations that differ are named."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from prfl_fast.ops import backends


class NonFiniteError(FloatingPointError):
    """A NaN or an infinity appeared; the message names step, branch and block."""


class RecomputationError(RuntimeError):
    """A recomputed block gave other bits than in the forward; the message names step, branch and block."""


def _first_tensor(output: Any) -> Tensor | None:
    if isinstance(output, Tensor):
        return output
    if isinstance(output, (tuple, list)):
        return next((t for t in map(_first_tensor, output) if t is not None), None)
    return None


def _is_finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())


@contextmanager
def _hooked(blocks: Sequence[tuple[str, nn.Module]], hook: Callable[[str, Tensor], None]) -> Iterator[None]:
    def forward_hook(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def call(_module: nn.Module, _inputs: Any, output: Any) -> None:
            tensor = _first_tensor(output)
            if tensor is not None:
                hook(name, tensor)

        return call

    handles = [block.register_forward_hook(forward_hook(name)) for name, block in blocks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class CallWatch:
    """Watches one network call (one step, one branch) in the forward and in its recomputation.

    Args:
        where: text that names the call in an error.
        blocks: the network's blocks by name.
        undoing: context around what is raised inside a backward, which undoes that backward.
        nonfinite: raise NonFiniteError at the first block whose output, or output gradient, is not finite.
        recompute: raise RecomputationError at the first block whose recomputed output differs in a bit.
    """

    def __init__(
        self,
        where: str,
        blocks: Sequence[tuple[str, nn.Module]],
        undoing: Callable[[], AbstractContextManager[None]],
        *,
        nonfinite: bool,
        recompute: bool,
    ) -> None:
        self._where = where
        self._blocks = blocks
        self._undoing = undoing
        self._nonfinite = nonfinite
        self._recompute = recompute
        self._hashes: dict[str, Tensor] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Hooks the blocks for one evaluation; the hooks are gone afterwards whatever happens."""
        with _hooked(self._blocks, self._see):
            yield

    @property
    def again(self) -> Callable[[nn.Module, Any], None] | None:
        """Looks at the output of a block that is a checkpoint of its own, in its forward and in its recomputation."""
        return self._see_block if self._recompute else None

    def _see_block(self, block: nn.Module, output: Any) -> None:
        tensor = _first_tensor(output)
        if tensor is not None:
            with self._undoing():
                self._compare(next(name for name, known in self._blocks if known is block), tensor)

    def output(self, prediction: Tensor) -> None:
        """The prediction itself, seen as the last block."""
        self._see("output", prediction)

    def _see(self, name: str, tensor: Tensor) -> None:
        if self._nonfinite:
            if not _is_finite(tensor):
                raise NonFiniteError(f"{self._where}, {name}: the forward gave a value that is not finite")
            if tensor.requires_grad:
                tensor.register_hook(lambda gradient: self._see_gradient(name, gradient))
        if self._recompute:
            self._compare(name, tensor)

    def _compare(self, name: str, tensor: Tensor) -> None:
        value = torch.hash_tensor(tensor.detach())
        first = self._hashes.setdefault(name, value)
        if not torch.equal(first, value):
            backend = backends.chosen() or "the best backend"
            raise RecomputationError(
                f"{self._where}, {name}, {backend} on {tensor.device.type}: the recomputation gave other bits than the "
                "forward; the network is no pure function of its inputs (state kept between calls, or a kernel that is "
                "not deterministic)"
            )

    def _see_gradient(self, name: str, gradient: Tensor) -> None:
        with self._undoing():
            if not _is_finite(gradient):
                raise NonFiniteError(f"{self._where}, {name}: the backward gave a gradient that is not finite")
