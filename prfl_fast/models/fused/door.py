"""The public door: which blocks are fused, by what, and back.

A block keeps its class and everything that it owns. Its instance gets a ``forward`` of its own, a
:class:`functools.partial` of the family's function: the block is still called through ``__call__``, so FSDP2,
checkpointing hooks, LoRA and whatever knows blocks by their class go on working, copies and pickles of a fused model
are fused, and ``unfuse`` takes one attribute away.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Collection
from typing import Any, TypeVar

from torch import nn

from prfl_fast.models.base import unwrap
from prfl_fast.models.fused.attend import why_unfused
from prfl_fast.models.fused.families import FAMILIES, Family
from prfl_fast.models.fused.linears import hooked
from prfl_fast.models.fused.values import class_path
from prfl_fast.models.unusable import refuse_unusable

Model = TypeVar("Model", bound=nn.Module)

_LEAF_HOOKS = ("group_offloading", "layer_execution_tracker")


def fuse(transformer: Model, *, only: Collection[str] | None = None) -> Model:
    """Let the transformer's blocks run on fused ops, forward and backward; in place.

    Outputs and gradients are those of the unfused transformer but for rounding, in fewer passes over memory and with
    less of it kept for the backward. ``state_dict``, saving and loading, LoRA (added before or after),
    ``enable_gradient_checkpointing``, FSDP2's ``fully_shard`` and ``fuse_projections`` work as before. Families: Wan
    2.1 and 2.2 (VACE too), HunyuanVideo, LTX-Video, CogVideoX. Blocks of other classes stay as they are, and a warning
    says so. An attention with a processor of the user's own stays as it is inside a fused block, with a warning.
    Fusing again does nothing.

    Fuse before ``enable_group_offload``, context parallelism and other hooks on blocks: they wrap the forward that they
    find. Hooks that are put on a norm, an attention or a feed-forward inside a block afterwards may not run: the block
    calls the linears and reads the rest.

    Args:
        transformer: a diffusers transformer, plain or inside peft, DDP or torch.compile.
        only: names of the blocks to fuse, as ``named_modules`` names them (``"blocks.0"``), or of a list of them
            (``"blocks"``); None: all.

    Returns:
        ``transformer`` itself.

    Raises:
        TypeError: no module.
        ValueError: ``only`` names no block with a fused forward; a block whose forward something else has replaced
            (group offload, a cache, a hook), or whose parts are offloaded one by one: the fused forward would not be
            called, or would read weights that are not there.
    """
    inner = _module(transformer)
    refuse_unusable(inner)
    found = {name: (block, family) for name, block in inner.named_modules() if (family := _family(block)) is not None}
    chosen = found if only is None else _chosen(found, only, type(inner).__name__)
    fresh = {name: pair for name, pair in chosen.items() if not (is_fused(pair[0]) or _is_wrapped(pair[0]))}
    for name, (block, _) in fresh.items():
        _refuse_hooks(name, block)
    if not found:
        warnings.warn(
            f"fuse: {type(inner).__name__} stays unfused: there is no fused block for it (families: Wan, "
            "HunyuanVideo, LTX-Video, CogVideoX)",
            stacklevel=2,
        )
    _tell_attentions(fresh)
    last = next(reversed(found), "")
    for name, (block, family) in fresh.items():
        forward = family.last if name and name == last and family.last is not None else family.forward
        # The instance's own dictionary: nothing of nn.Module's or a wrapper's __setattr__ has a say in it.
        vars(block)["forward"] = functools.partial(forward, block)
    return transformer


def unfuse(transformer: Model) -> Model:
    """Give every fused block its class's own forward again; nothing is left of :func:`fuse`.

    Returns:
        ``transformer`` itself.

    Raises:
        TypeError: no module.
        ValueError: something (group offload, a hook) has wrapped a fused forward since: remove that first.
    """
    inner = _module(transformer)
    blocks = [(name, block) for name, block in inner.named_modules() if _family(block) is not None]
    for name, block in blocks:
        if _is_wrapped(block):
            raise ValueError(
                f"unfuse: {name!r} was fused, and its forward has been wrapped since (group offload, context "
                "parallelism, a cache or another hook): remove that first"
            )
    for _, block in blocks:
        if is_fused(block):
            del vars(block)["forward"]
    return transformer


def is_fused(block: nn.Module) -> bool:
    """True where calling the block runs its family's fused forward."""
    forward, family = vars(block).get("forward"), _family(block)
    if family is None or not isinstance(forward, functools.partial):
        return False
    return forward.func in (family.forward, family.last) and forward.args[0] is block


def _is_wrapped(block: nn.Module) -> bool:
    """True where something (diffusers' hooks, accelerate) wraps the block's fused forward, which still runs."""
    ours = {forward for family in FAMILIES.values() for forward in (family.forward, family.last)}
    attributes = vars(block)
    references = getattr(attributes.get("_diffusers_hook"), "_fn_refs", ())
    wrapped = [attributes.get("forward"), attributes.get("_old_forward")]
    wrapped += [f for ref in references for f in (ref.forward, ref.original_forward)]
    found = {getattr(forward, "func", None) for forward in wrapped if forward is not None}
    return not is_fused(block) and bool((found & ours) - {None})


def _module(transformer: Any) -> nn.Module:
    inner = unwrap(transformer)
    if not isinstance(inner, nn.Module):
        raise TypeError(f"transformer: expected a module, got {type(inner).__name__}")
    return inner


def _family(block: nn.Module) -> Family | None:
    # FSDP2 swaps a module's class for one derived from it.
    return next((FAMILIES[path] for cls in type(block).__mro__ if (path := class_path(cls)) in FAMILIES), None)


def _chosen(found: dict[str, Any], only: Collection[str], who: str) -> dict[str, Any]:
    names = [only] if isinstance(only, str) else list(only)
    chosen: dict[str, Any] = {}
    for wanted in names:
        matching = {name: pair for name, pair in found.items() if name == wanted or name.startswith(f"{wanted}.")}
        if not matching:
            known = sorted({name.rpartition(".")[0] or name for name in found})
            raise ValueError(
                f"only: expected names of blocks or of lists of them in {who} "
                f"({', '.join(known) or 'it has none that can be fused'}), got {wanted!r}"
            )
        chosen |= matching
    return chosen


def _refuse_hooks(name: str, block: nn.Module) -> None:
    for part_name, part in block.named_modules():
        hooks = getattr(getattr(part, "_diffusers_hook", None), "hooks", {})
        if part is not block and any(offload in hook for hook in hooks for offload in _LEAF_HOOKS):
            raise ValueError(
                f"transformer: '{name}.{part_name}' is offloaded by itself (leaf-level group offload); a fused block "
                "reads weights without calling their modules: fuse first, then "
                "enable_group_offload(offload_type='block_level')"
            )
    if "forward" in vars(block):
        raise ValueError(
            f"transformer: the forward of {name!r} has been replaced already (group offload, context parallelism, a "
            "cache, accelerate or another hook), and the fused one would never be called: fuse first, then enable that"
        )
    for part_name, part in block.named_modules():
        if part is not block and hooked(part) and not isinstance(part, nn.Linear) and not _called(block, part_name):
            raise ValueError(
                f"transformer: '{name}.{part_name}' ({type(part).__name__}) has a hook or a forward of its own, which "
                f"a fused block would not run: remove it, or leave {name!r} out of only="
            )


def _called(block: nn.Module, part: str) -> bool:
    """True for a part inside an attention (which stays unfused then), a linear (LoRA) or a feed-forward."""
    family = _family(block)
    attentions = () if family is None else family.attentions
    return part.split(".")[0] in (*attentions, "ff", "ffn", "ff_context") or "lora_" in part


def _tell_attentions(blocks: dict[str, tuple[nn.Module, Family]]) -> None:
    reasons: dict[str, list[str]] = {}
    for name, (block, family) in blocks.items():
        for attention in family.attentions:
            reason = why_unfused(getattr(block, attention), family.processors)
            if reason is not None:
                reasons.setdefault(reason, []).append(f"{name}.{attention}")
    for reason, names in reasons.items():
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        warnings.warn(f"fuse: the attention {names[0]}{more} stays as it is: {reason}", stacklevel=3)
