"""The first blocks of a transformer as a module of their own: what a process reward reads.

The trunk runs the transformer class's *own* forward on a second body with a shorter block list, whose last entry is a
stop: it hands out the token stream that the next block would have received. So the trunk's bits are the transformer's
bits, whatever the class does before its blocks, and nothing of a family is written a second time.
"""

from __future__ import annotations

import copy as copying
import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:
    from prfl_fast.models.transformer import TransformerAdapter


SHARDED = "transformer: already sharded by FSDP; make the trunk before sharding, then shard the trunk itself"


class _Reached(Exception):
    """Carries the token stream out of the forward."""

    def __init__(self, stream: Tensor) -> None:
        super().__init__()
        self.stream = stream


class _Stop(nn.Module):
    """Stands where the first block that is not wanted stood. Has no weights."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        raise _Reached(hidden_states)


class Trunk(nn.Module):
    """Embedders and first blocks of a transformer; see :func:`make_trunk`.

    ``body`` is a transformer of the same class with fewer blocks and no head, ``config`` what
    :func:`prfl_fast.models.trunk_from_config` needs. A shared trunk follows its transformer: adapters that are added
    later and gradient checkpointing that is switched later count here too; ``train`` and ``eval`` switch the shared
    blocks for both.
    """

    _live: nn.Module | None

    def __init__(
        self, body: nn.Module, family: type[TransformerAdapter], config: dict[str, Any], live: nn.Module | None
    ) -> None:
        super().__init__()
        self.body = body
        self.config = config
        self._family = family
        # Not registered: its later blocks and its head are no part of the trunk.
        self.__dict__["_live"] = live

    @property
    def dim(self) -> int:
        """Width of the token stream."""
        sizes = self.config["transformer"]
        return int(sizes["num_attention_heads"] * sizes["attention_head_dim"])

    def blocks(self) -> list[tuple[str, nn.Module]]:
        """Named blocks in the order of execution."""
        lists = [(name, getattr(self.body, name)) for name, _ in self._family.block_lists]
        named = [(f"body.{name}.{i}", block) for name, blocks in lists for i, block in enumerate(blocks)]
        return [(name, block) for name, block in named if not isinstance(block, _Stop)]

    def detach_from_transformer(self) -> Trunk:
        """Stop following the transformer, whose later blocks and head can then be freed. The weights stay shared."""
        self.__dict__["_live"] = None
        return self

    def forward(self, latents: Tensor, timestep: Tensor, **conditioning: Any) -> Tensor:
        """``[B, L, D]`` video tokens after the last block of the trunk, in the transformer's dtype.

        Args:
            latents: in the pipeline's layout, any float dtype.
            timestep: 0-dimensional or ``[B]``.
            conditioning: the transformer's keywords.
        """
        if _sharded(self.body):
            raise ValueError("trunk.body: sharded by FSDP, which would miss its end; shard the trunk and its blocks")
        if self._live is not None:
            _follow(self.body, self._live, self._family)
        checkpoint = self.body.__dict__.get("_gradient_checkpointing_func")
        if checkpoint is not None and not isinstance(checkpoint, _CheckpointUnlessStop):
            self.body.__dict__["_gradient_checkpointing_func"] = _CheckpointUnlessStop(checkpoint)
        keywords = self._family.inputs(self.body, latents, timestep, conditioning)
        scales = _lora_scales(self.body) if "attention_kwargs" in conditioning else []
        before = [dict(scale) for scale in scales]
        try:
            self.body(**keywords, return_dict=False)
        except _Reached as reached:
            # Older diffusers undo the LoRA scale only where the forward ends without an exception.
            for scale, old in zip(scales, before, strict=True):
                scale.update(old)
            return reached.stream
        raise RuntimeError(f"{type(self.body).__name__} did not call its blocks as a list; the trunk needs that")


def make_trunk(net: nn.Module, family: type[TransformerAdapter], num_blocks: int, copy: bool) -> Trunk:
    """Embedders and first ``num_blocks`` blocks of ``net``: its own submodules, or copies of them.

    Raises ValueError when ``num_blocks`` is out of range, when ``net`` is sharded by FSDP, or when a copy is asked of a
    network with adapters (the copy's config could not tell them).
    """
    depth = sum(len(getattr(net, name)) for name, _ in family.block_lists)
    if isinstance(num_blocks, bool) or not isinstance(num_blocks, int) or not 1 <= num_blocks <= depth:
        raise ValueError(f"num_blocks: expected a whole number in 1..{depth}, got {num_blocks!r}")
    if _sharded(net) or (copy and any(map(_sharded, net.modules()))):
        raise ValueError(SHARDED)
    if copy and any(hasattr(module, "lora_A") or hasattr(module, "base_layer") for module in net.modules()):
        raise ValueError(
            "transformer: has adapters (LoRA), which a copied trunk would not keep apart; copy before they are added, "
            "merge them first, or share the trunk (copy=False)"
        )
    # FSDP, peft and users derive classes of their own; the config must name one that diffusers has.
    class_name = next((c for c in type(net).__mro__ if c.__module__.startswith("diffusers.")), type(net)).__name__
    config: Any = net.config
    shorter = {key: value for key, value in dict(config).items() if not key.startswith("_")}
    body: nn.Module = object.__new__(type(net))
    nn.Module.__init__(body)
    body.training = net.training
    _follow(body, net, family)
    left, stopped = num_blocks, False
    for name, length in family.block_lists:
        kept = list(getattr(net, name))[:left]
        left -= len(kept)
        shorter[length] = len(kept)
        # The stop stands in the first list that has an unwanted block, or at the very end.
        last = name == family.block_lists[-1][0]
        if not stopped and (last or (left == 0 and len(kept) < len(getattr(net, name)))):
            kept, stopped = [*kept, _Stop()], True
        body._modules[name] = nn.ModuleList(kept)
    described = {"class_name": class_name, "transformer": json.loads(json.dumps(shorter))}
    trunk = Trunk(body, family, described, None if copy else net)
    return copying.deepcopy(trunk) if copy else trunk


def _sharded(module: nn.Module) -> bool:
    return any(cls.__name__ == "FSDPModule" for cls in type(module).__mro__)


def _lora_scales(module: nn.Module) -> list[dict[str, float]]:
    """peft's LoRA layers keep one scale per adapter name."""
    found = [getattr(layer, "scaling", None) for layer in module.modules()]
    return [scale for scale in found if isinstance(scale, dict)]


# Of an instance, not of its class: hooks that replace forward, and compiled code, belong to the transformer alone.
_OWN = {"forward", "_diffusers_hook", "_hf_hook", "_old_forward", "_compiled_call_impl", "training"}
_REGISTRIES = ("_modules", "_parameters", "_buffers")


def _follow(body: nn.Module, net: nn.Module, family: type[TransformerAdapter]) -> None:
    """Let ``body`` have everything that ``net`` has, in the same order, except its block lists, head and hooks."""
    lists = {name for name, _ in family.block_lists}
    for key, value in net.__dict__.items():
        if key in _REGISTRIES:
            own: dict[str, Any] = body.__dict__[key]
            entries = {n: own.get(n, v) if n in lists else v for n, v in value.items() if n not in family.head}
            own.clear()
            own.update(entries)
        elif key not in _OWN and "_hooks" not in key:
            body.__dict__[key] = value


class _CheckpointUnlessStop:
    """Gradient checkpointing of every block but the stop: a checkpoint that is left by an exception stays open."""

    def __init__(self, checkpoint: Callable[..., Any]) -> None:
        self._checkpoint = checkpoint

    def __call__(self, block: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(getattr(block, "__self__", block), _Stop):
            return block(*args, **kwargs)
        return self._checkpoint(block, *args, **kwargs)
