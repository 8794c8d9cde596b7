"""FSDP2 after a failure: what an exception leaves half-way has to be reset, or later gradients are wrong in silence.

An exception that ends a forward or a backward early leaves FSDP2 in the middle of it: it never reduces a gradient
again. That is so in a plain loop too.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any
from weakref import WeakSet

from torch import nn

# Networks that could not be reset.
_LEFT: WeakSet[nn.Module] = WeakSet()


def is_sharded(module: nn.Module) -> bool:
    """Whether ``fully_shard`` was applied to the module itself."""
    return any(cls.__name__ == "FSDPModule" for cls in type(module).__mro__)


def _roots(module: nn.Module) -> Iterator[Any]:
    if is_sharded(module):
        yield module
        return
    for child in module.children():
        yield from _roots(child)


def reset_sharded(modules: Iterable[nn.Module]) -> None:
    """After an exception: FSDP2 forgets the pass that was under way. Every rank has to come here; a rank that does not
    is still waiting for the others in any case."""
    for module in modules:
        for root in _roots(module):
            try:
                root.reset_iter_state()
            except (AttributeError, RuntimeError):  # older torch; sharded as a part of something that is not seen here
                _LEFT.add(root)


def refuse_left_half_way(modules: Iterable[nn.Module]) -> None:
    """Raise RuntimeError for a network that an earlier failure left half-way and that could not be reset."""
    if any(root in _LEFT for module in modules for root in _roots(module)):
        raise RuntimeError(
            "transformer: an earlier exception left FSDP2 in the middle of a forward or backward, after which its "
            "gradients would be wrong in silence, and FSDPModule.reset_iter_state (torch 2.13) is missing or did not "
            "take it; load the network anew"
        )
