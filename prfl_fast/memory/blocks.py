"""Recomputation block by block: inside one network call a block keeps its inputs, and what its keep-set names."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import checkpoint

from prfl_fast.memory.keeps import NOTHING
from prfl_fast.memory.selective import CallMemory, Watch

Scalings = list[tuple[dict[str, Any], dict[str, Any]]]


def _scalings(block: nn.Module) -> Scalings:
    """LoRA scalings in the block (peft's convention: a dictionary per adapter name) with their present values."""
    found = [getattr(m, "scaling", None) for m in block.modules()]
    return [(scaling, dict(scaling)) for scaling in found if isinstance(scaling, dict)]


@contextmanager
def _pinned(scalings: Scalings) -> Iterator[None]:
    """LoRA scalings as they were in the forward. diffusers multiplies them by ``attention_kwargs["scale"]`` for the
    duration of a call and undoes it when the call is left, which is before a block's recomputation."""
    present = [(scaling, dict(scaling)) for scaling, _ in scalings]
    try:
        for scaling, values in scalings:
            scaling.update(values)
        yield
    finally:
        for scaling, values in present:
            scaling.update(values)


def checkpointed(
    block: nn.Module, forward: Callable[..., Any], memory: CallMemory, watch: Watch | None
) -> Callable[..., Any]:
    """``forward`` as a non-reentrant checkpoint that gives the same values whenever it runs again."""

    def call(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        # Tensors go in one by one: those inside tuples, dictionaries and keywords too are then saved as autograd saves
        # tensors, and a checkpoint around this one can let go of them. It also looks at them for the random state.
        leaves, structure = tree_flatten((args, kwargs))
        scalings = _scalings(block)

        def run(*flat: Any) -> Any:
            own_args, own_kwargs = tree_unflatten(list(flat), structure)
            with _pinned(scalings):
                output = forward(*own_args, **own_kwargs)
            if watch is not None:
                watch(block, output)
            return output

        contexts = memory.contexts(block)
        return checkpoint(run, *leaves, use_reentrant=False, context_fn=lambda: contexts)

    return call


@contextmanager
def recompute_blocks(
    module: nn.Module, blocks: Sequence[nn.Module], memory: CallMemory | None = None, watch: Watch | None = None
) -> Iterator[None]:
    """While active, the forward of each block is a checkpoint: its inputs are kept, and it runs again in the backward.

    The backward may come after the context has been left. Gradients are those of the plain call: dropout and autocast
    are restored by torch's checkpoint, LoRA scalings are pinned here. What is recomputed depends on the block alone,
    never on a count of calls. Hooks on a block run once, outside its checkpoint. Gradient checkpointing that the model
    was given by ``enable_gradient_checkpointing`` rests meanwhile: a block would be recomputed twice.

    Args:
        module: the network that is going to be called.
        blocks: modules inside it, in any order; one that is listed twice counts once.
        memory: what each block keeps beside its inputs, and which blocks are no checkpoint; None: all keep nothing.
        watch: called with a block and its output in its forward and in its recomputation.
    """
    if memory is None:
        memory = CallMemory(dict.fromkeys(map(id, blocks), NOTHING), recomputed=False)
    memory.begin()
    saved: list[tuple[dict[str, Any], str, bool, Any]] = []

    def put(owner: nn.Module, name: str, value: Any) -> None:
        # The instance's own dictionary: nothing of nn.Module's or a wrapper's __setattr__ has a say in it.
        attributes = vars(owner)
        saved.append((attributes, name, name in attributes, attributes.get(name)))
        attributes[name] = value

    try:
        for part in module.modules():
            if getattr(part, "gradient_checkpointing", False) is True:
                put(part, "gradient_checkpointing", False)
        for block in {id(block): block for block in blocks if memory.checkpointed(block)}.values():
            # A block compiled in place is called through its compiled call, and stays compiled.
            compiled = vars(block).get("_compiled_call_impl")
            name, forward = ("forward", block.forward) if compiled is None else ("_compiled_call_impl", compiled)
            put(block, name, checkpointed(block, forward, memory, watch))
        yield
    finally:
        for attributes, name, present, value in reversed(saved):
            if present:
                attributes[name] = value
            else:
                del attributes[name]
