"""What wrapped networks need after a failure.

An exception that ends a forward or a backward early leaves FSDP2 in the middle of it: it never reduces a gradient
again, in silence, in a plain loop too. diffusers' layerwise casting and group offload put a layer's weights back only
when its forward is left well.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any
from weakref import WeakSet

from torch import nn

# diffusers' hooks that change a layer's weights for the duration of its forward.
_WEIGHT_HOOKS = {"layerwise_casting", "group_offloading"}

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


def _weight_hooks(module: nn.Module) -> Iterator[tuple[nn.Module, Any]]:
    for part in module.modules():
        hooks = getattr(getattr(part, "_diffusers_hook", None), "hooks", {})
        yield from ((part, hooks[name]) for name in _WEIGHT_HOOKS & hooks.keys())


def has_weight_hooks(module: nn.Module) -> bool:
    """Whether some layer's weights are elsewhere, or in another dtype, but for its forward."""
    return next(_weight_hooks(module), None) is not None


def recover(modules: Sequence[nn.Module]) -> None:
    """After an exception: FSDP2 forgets the pass that was under way, hooked weights go back to their place.

    Every rank has to come here; a rank that does not is still waiting for the others in any case.
    """
    for module in modules:
        for part, hook in _weight_hooks(module):
            hook.post_forward(part, None)
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
