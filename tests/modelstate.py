"""Everything that a failed call has to leave as it was, in one comparable dictionary."""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def same(a: Any, b: Any) -> bool:
    """Equality that goes into tensors and containers."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def state_of(net: nn.Module, scheduler: Any, leaves: Iterable[Tensor], generator: torch.Generator) -> dict[str, Any]:
    """The network with all that hangs on it, the scheduler, random and global state, and ``.grad`` of the leaves."""
    modules, parameters = dict(net.named_modules()), dict(net.named_parameters())
    grads = [*leaves, *parameters.values()]
    return {
        "weights": {k: v.detach().clone() for k, v in net.state_dict().items()},
        "versions": [p._version for p in parameters.values()],
        "parameters": {k: (id(p), p.requires_grad, p.dtype) for k, p in parameters.items()},
        "modes": {k: m.training for k, m in modules.items()},
        "hooks": {k: [list(getattr(m, name)) for name in HOOKS] for k, m in modules.items()},
        # A block that is recomputed has its forward replaced in the instance's own dictionary for the call.
        "attributes": {k: sorted(vars(m)) for k, m in modules.items()},
        "scaling": {k: dict(m.scaling) for k, m in modules.items() if isinstance(getattr(m, "scaling", None), dict)},
        "checkpointing": {
            k: (m.gradient_checkpointing, id(getattr(m, "_gradient_checkpointing_func", None)))
            for k, m in modules.items()
            if hasattr(m, "gradient_checkpointing")
        },
        "scheduler": copy.deepcopy(scheduler.__dict__),
        "random": [torch.get_rng_state(), generator.get_state()],
        "modes of torch": [
            torch.is_grad_enabled(),
            torch.is_autocast_enabled("cpu"),
            torch.is_autocast_cache_enabled(),
            torch.utils.checkpoint._enable_checkpoint_early_stop,
        ],
        "which .grad": [id(t.grad) for t in grads],
        ".grad": [None if t.grad is None else t.grad.clone() for t in grads],
    }


def assert_untouched(before: dict[str, Any], after: dict[str, Any]) -> None:
    """Names what differs."""
    assert [key for key in before if not same(before[key], after[key])] == []


def living(shape: torch.Size) -> int:
    """How many tensors of this shape are alive."""
    gc.collect()
    return sum(isinstance(o, Tensor) and o.shape == shape for o in gc.get_objects() if type(o) is Tensor)
