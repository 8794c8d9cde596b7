"""All or nothing for ``.grad``: a backward that fails half-way puts every gradient back to what it was."""

from __future__ import annotations

import warnings
from collections.abc import Iterable

import torch
from torch import Tensor

# Gradients that were there before (accumulation) have to be copied, to be put back. Up to this many bytes; beyond it
# the copy would cost more than it is worth, and a warning says that such a failure can't be undone.
COPY_LIMIT_BYTES = 2**30


class GradientTransaction:
    """Remembers ``.grad`` of the given leaves until ``commit`` or ``rollback``."""

    def __init__(self, leaves: Iterable[Tensor]) -> None:
        self._leaves = [leaf for leaf in leaves if leaf.is_leaf and leaf.requires_grad]
        self._saved: list[tuple[Tensor, Tensor | None, Tensor | None]] | None = None

    def begin(self) -> None:
        """Starts, or starts anew when the last backward ended without reaching commit."""
        present = [leaf.grad for leaf in self._leaves if leaf.grad is not None]
        copies = sum(grad.numel() * grad.element_size() for grad in present) <= COPY_LIMIT_BYTES
        if not copies:
            warnings.warn(
                "the gradients accumulated so far exceed 1 GiB and are not copied: if this backward fails, they will "
                "hold a part of it",
                RuntimeWarning,
                stacklevel=2,
            )
        self._saved = []
        for leaf in self._leaves:
            if leaf.grad is None:
                self._saved.append((leaf, None, None))
            elif copies:
                self._saved.append((leaf, leaf.grad, leaf.grad.detach().clone()))

    def commit(self) -> None:
        """The backward is complete: forget the old gradients."""
        self._saved = None

    def rollback(self) -> None:
        """The backward failed: put the old gradients back, in their own tensors."""
        if self._saved is None:
            return
        for leaf, grad, copy in self._saved:
            if grad is not None and copy is not None:
                with torch.no_grad():
                    grad.copy_(copy)
            leaf.grad = grad
        self._saved = None
