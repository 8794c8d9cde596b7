"""Model families: one small adapter each. Which network gets which, and which can't be differentiated at all."""

from __future__ import annotations

from typing import Any

from prfl_fast.models.base import Adapter, unwrap
from prfl_fast.models.cogvideox import CogVideoXAdapter
from prfl_fast.models.cosmos import CosmosAdapter
from prfl_fast.models.generic import CallableAdapter, GenericAdapter, takes_hidden_states
from prfl_fast.models.hunyuan_video import HunyuanVideoAdapter
from prfl_fast.models.images import FluxAdapter, QwenImageAdapter, SD3Adapter
from prfl_fast.models.ltx import LTXAdapter
from prfl_fast.models.ltx2 import LTX2Adapter
from prfl_fast.models.transformer import TransformerAdapter, WithoutTrunk
from prfl_fast.models.trunk import Trunk
from prfl_fast.models.unusable import refuse_unusable
from prfl_fast.models.videos import (
    AllegroAdapter,
    ConsisIDAdapter,
    EasyAnimateAdapter,
    HunyuanVideo15Adapter,
    Kandinsky5Adapter,
    MochiAdapter,
    SanaVideoAdapter,
)
from prfl_fast.models.wan import SkyReelsV2Adapter, WanAdapter
from prfl_fast.models.wan_vace import WanVACEAdapter

__all__ = ["Adapter", "Trunk", "adapter_for", "refuse_unusable", "trunk_from_config"]

FAMILIES: dict[str, type[TransformerAdapter]] = {
    "AllegroTransformer3DModel": AllegroAdapter,
    "CogVideoXTransformer3DModel": CogVideoXAdapter,
    "ConsisIDTransformer3DModel": ConsisIDAdapter,
    "CosmosTransformer3DModel": CosmosAdapter,
    "EasyAnimateTransformer3DModel": EasyAnimateAdapter,
    "FluxTransformer2DModel": FluxAdapter,
    "HunyuanVideo15Transformer3DModel": HunyuanVideo15Adapter,
    "HunyuanVideoTransformer3DModel": HunyuanVideoAdapter,
    "Kandinsky5Transformer3DModel": Kandinsky5Adapter,
    "LTX2VideoTransformer3DModel": LTX2Adapter,
    "LTXVideoTransformer3DModel": LTXAdapter,
    "MochiTransformer3DModel": MochiAdapter,
    "QwenImageTransformer2DModel": QwenImageAdapter,
    "SD3Transformer2DModel": SD3Adapter,
    "SanaVideoTransformer3DModel": SanaVideoAdapter,
    "SkyReelsV2Transformer3DModel": SkyReelsV2Adapter,
    "WanTransformer3DModel": WanAdapter,
    "WanVACETransformer3DModel": WanVACEAdapter,
}


def adapter_for(network: Any) -> Adapter:
    """The adapter of a diffusers transformer or callable, seen through compile, DDP, FSDP and peft.

    Families are recognised by the name of a class that the network's class derives from (FSDP2 swaps the class for a
    derived one); any other module that takes ``hidden_states`` and ``timestep`` is called as diffusers' are, with the
    scheduler's own timestep, which ``prepare_input`` has to convert where the pipeline does; anything else as
    ``net(x, t, **conditioning)``.
    """
    inner = unwrap(network)
    family = _family(type(inner))
    if family is not None:
        return family(network)
    return GenericAdapter(network) if takes_hidden_states(inner) else CallableAdapter(network)


def trunk_from_config(config: dict[str, Any]) -> Trunk:
    """A trunk with random weights from another trunk's ``config``. Raises ValueError for what no family knows."""
    import diffusers

    name = config.get("class_name")
    cls: Any = getattr(diffusers, name, object) if isinstance(name, str) else object
    family = _family(cls)
    if family is None or issubclass(family, WithoutTrunk):
        known = ", ".join(name for name, family in FAMILIES.items() if not issubclass(family, WithoutTrunk))
        raise ValueError(f"config: class_name: expected one of {known}, got {name!r}")
    net = cls.from_config(config["transformer"])
    depth = sum(len(getattr(net, blocks)) for blocks, _ in family.block_lists)
    return family(net).trunk(depth, copy=False).detach_from_transformer()


def _family(cls: type) -> type[TransformerAdapter] | None:
    return next((FAMILIES[c.__name__] for c in cls.__mro__ if c.__name__ in FAMILIES), None)
