"""Which block classes have a fused forward. To add a family: its file, and its line here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from prfl_fast.models.fused import wan


class Family(NamedTuple):
    """One class of blocks.

    Attributes:
        forward: ``(block, *args, **kwargs)``, with the arguments and the result of the class's own forward.
        attentions: names of the block's attention modules.
        processors: class paths of the attention processors whose arithmetic ``forward`` writes down.
    """

    forward: Callable[..., Any]
    attentions: tuple[str, ...]
    processors: tuple[str, ...]


_WAN = ("attn1", "attn2")

# By the class path of the block.
FAMILIES: dict[str, Family] = {
    "diffusers.models.transformers.transformer_wan.WanTransformerBlock": Family(wan.wan_block, _WAN, wan.PROCESSORS),
    "diffusers.models.transformers.transformer_wan_vace.WanVACETransformerBlock": Family(
        wan.wan_vace_block, _WAN, wan.PROCESSORS
    ),
}
