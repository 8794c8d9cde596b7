"""Selective recomputation: the kept outputs of a checkpointed block go from its forward to its recomputation.

torch's own pair of contexts (``create_selective_checkpoint_contexts``) ties what is kept to the forward of the same
checkpoint. Here a whole network call may be recomputed too, and then it is that recomputation, not the call's first
run, from which a block keeps: otherwise every step of a chain would hold its kept outputs. So the two contexts share a
queue that belongs to the call, and whichever run is the last before the block's backward fills it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from prfl_fast.memory.keeps import ALL, Labels, parse_keep, written_by
from prfl_fast.memory.trace import tensors_in

Contexts = tuple[AbstractContextManager[Any], AbstractContextManager[Any]]
# Given a block and the output of its forward or of its recomputation.
Watch = Callable[[nn.Module, Any], None]


class _Kept:
    """Kept outputs of one run of a block, in the order of its operations; None for one that was written into."""

    def __init__(self) -> None:
        self.outputs: deque[tuple[Any, Any]] = deque()

    def spoil(self, changed: list[Tensor]) -> None:
        """Lets go of outputs that an operation writes into: it has to run again, on what was there before."""
        keys = {t.untyped_storage()._cdata for t in changed}
        for place, (func, result) in enumerate(self.outputs):
            if keys & {t.untyped_storage()._cdata for t in tensors_in(result)}:
                self.outputs[place] = (func, None)


class _Saving(TorchDispatchMode):
    """Around a block's forward: outputs of its keep-set are queued."""

    def __init__(self, block: nn.Module, keep: frozenset[str], kept: _Kept) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._block, self._keep, self._kept = block, keep, kept
        self._labels: Labels | None = None

    def __enter__(self) -> Any:
        self._kept.outputs.clear()  # of a backward before, whose recomputation ended early
        self._labels = Labels(self._block)
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *error: Any) -> Any:
        self._labels = None
        return super().__exit__(*error)  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        labels = self._labels
        if labels is None:
            return func(*args, **kwargs)
        label = labels.of(func, args, kwargs)
        if func._schema.is_mutable:
            self._kept.spoil(written_by(func, args, kwargs))
        result = func(*args, **kwargs)
        if label in self._keep:
            self._kept.outputs.append((func, tree_map_only(Tensor, torch.Tensor.detach, result)))
        elif label is None:
            labels.see(func, args, kwargs, result)
        return result


class _Using(TorchDispatchMode):
    """Around its recomputation: kept outputs stand in for their operations, as long as there are some."""

    def __init__(self, block: nn.Module, keep: frozenset[str], kept: _Kept) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._block, self._keep, self._kept = block, keep, kept
        self._labels: Labels | None = None

    def __enter__(self) -> Any:
        self._labels = Labels(self._block)
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *error: Any) -> Any:
        self._labels = None
        self._kept.outputs.clear()  # those behind the last tensor that the backward needs
        return super().__exit__(*error)  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        labels = self._labels
        if labels is None:
            return func(*args, **kwargs)
        label = labels.of(func, args, kwargs)
        if label in self._keep and self._kept.outputs:
            known, result = self._kept.outputs.popleft()
            if known is not func:
                raise RuntimeError(
                    f"{type(self._block).__name__}: its recomputation came to {func}, where its forward had {known}; a "
                    "block that is recomputed must run the same operations every time"
                )
            if result is not None:
                return result
        result = func(*args, **kwargs)
        if label is None:
            labels.see(func, args, kwargs, result)
        return result


class CallMemory:
    """What the blocks of one network call keep, over its runs: the first one and, where it is a checkpoint, one more in
    each backward.

    Args:
        keeps: keep-set of each block, by the block's identity; a block that is not among them is no checkpoint.
        recomputed: the call as a whole is recomputed; its first run then keeps nothing.
    """

    def __init__(self, keeps: dict[int, str], recomputed: bool) -> None:
        self._keeps = keeps
        self._recomputed = recomputed
        self._kept: dict[int, list[_Kept]] = {}
        self._runs: dict[int, int] = {}
        self._begun = 0

    def begin(self) -> None:
        """A run of the call begins."""
        self._begun += 1
        self._runs.clear()

    def checkpointed(self, block: nn.Module) -> bool:
        """Whether the block is a checkpoint."""
        return self._keeps.get(id(block), ALL) != ALL

    def contexts(self, block: nn.Module) -> Contexts:
        """Contexts of the block's forward and of its recomputation, in this run."""
        keep = parse_keep(self._keeps[id(block)])
        if not keep:
            return nullcontext(), nullcontext()
        # The n-th run of a block in the recomputed call is the n-th of the first one: its graph is that one's.
        number = self._runs.get(id(block), 0)
        self._runs[id(block)] = number + 1
        queue = self._kept.setdefault(id(block), [])
        if number == len(queue):
            queue.append(_Kept())
        kept = queue[number]
        if self._recomputed and self._begun == 1:
            return nullcontext(), _Using(block, keep, kept)
        return _Saving(block, keep, kept), _Using(block, keep, kept)

