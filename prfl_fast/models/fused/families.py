"""Which block classes have a fused forward. To add a family: its file, and its line here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from prfl_fast.models.fused import cogvideox, hunyuan_video, ltx, wan


class Family(NamedTuple):
    """One class of blocks.

    Attributes:
        forward: ``(block, *args, **kwargs)``, with the arguments and the result of the class's own forward.
        attentions: names of the block's attention modules.
        processors: class paths of the attention processors whose arithmetic ``forward`` writes down.
        last: for a network's last block, where ``forward`` would compute gradients of what no one reads.
    """

    forward: Callable[..., Any]
    attentions: tuple[str, ...]
    processors: tuple[str, ...]
    last: Callable[..., Any] | None = None


_WAN = ("attn1", "attn2")
_HUNYUAN = "diffusers.models.transformers.transformer_hunyuan_video.HunyuanVideo"
_DOUBLE = Family(hunyuan_video.double_block, ("attn",), hunyuan_video.PROCESSORS)
_SINGLE = Family(hunyuan_video.single_block, ("attn",), hunyuan_video.PROCESSORS, hunyuan_video.last_single_block)

# By the class path of the block.
FAMILIES: dict[str, Family] = {
    "diffusers.models.transformers.transformer_wan.WanTransformerBlock": Family(wan.wan_block, _WAN, wan.PROCESSORS),
    "diffusers.models.transformers.transformer_wan_vace.WanVACETransformerBlock": Family(
        wan.wan_vace_block, _WAN, wan.PROCESSORS
    ),
    f"{_HUNYUAN}TransformerBlock": _DOUBLE,
    f"{_HUNYUAN}TokenReplaceTransformerBlock": _DOUBLE,
    f"{_HUNYUAN}SingleTransformerBlock": _SINGLE,
    f"{_HUNYUAN}TokenReplaceSingleTransformerBlock": _SINGLE,
    "diffusers.models.transformers.transformer_ltx.LTXVideoTransformerBlock": Family(
        ltx.ltx_block, ("attn1", "attn2"), ltx.PROCESSORS
    ),
    "diffusers.models.transformers.cogvideox_transformer_3d.CogVideoXBlock": Family(
        cogvideox.cogvideox_block, ("attn1",), cogvideox.PROCESSORS, cogvideox.last_block
    ),
}
