"""All or nothing: a backward that fails half-way puts ``.grad`` back, a rollout that fails the random state."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.utils.checkpoint import get_device_states, set_device_states

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


@contextmanager
def random_state_back_on_failure(
    latents: Tensor, generators: torch.Generator | Iterable[torch.Generator] | None
) -> Iterator[None]:
    """What fails has drawn nothing: torch's own random state, of the CPU and of the latents' device, and that of the
    given generators are put back when the body is left by an exception; so the next try is the same rollout."""
    given = [generators] if isinstance(generators, torch.Generator) else list(generators or ())
    states = [generator.get_state() for generator in given]
    cpu, devices = torch.get_rng_state(), get_device_states(latents)
    try:
        yield
    except BaseException:
        for generator, state in zip(given, states, strict=True):
            generator.set_state(state)
        torch.set_rng_state(cpu)
        set_device_states(*devices)
        raise
