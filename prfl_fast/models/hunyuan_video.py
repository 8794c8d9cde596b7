"""HunyuanVideo: ``[B, C, F, H, W]``; dual-stream, then single-stream blocks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from prfl_fast.models.transformer import TransformerAdapter


class HunyuanVideoAdapter(TransformerAdapter):
    """``HunyuanVideoTransformer3DModel``; blocks are counted through both lists, the trunk gives video tokens only."""

    layout = "BCFHW"
    block_lists = (("transformer_blocks", "num_layers"), ("single_transformer_blocks", "num_single_layers"))
    head = ("norm_out", "proj_out")
    text_width = "text_embed_dim"
    cast = ("encoder_hidden_states", "pooled_projections", "guidance")
    batched = ("encoder_hidden_states", "encoder_attention_mask", "pooled_projections", "guidance")

    @classmethod
    def patch(cls, config: Any) -> dict[str, int]:
        return {"F": config.patch_size_t, "H": config.patch_size, "W": config.patch_size}

    @classmethod
    def needed(cls, config: Any) -> tuple[str, ...]:
        always = ("encoder_hidden_states", "encoder_attention_mask", "pooled_projections")
        return (*always, "guidance") if config.guidance_embeds else always

    @classmethod
    def inputs(
        cls,
        module: nn.Module,
        x: Tensor,
        timestep: Tensor,
        conditioning: Mapping[str, Any],
        overrides: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        keywords = super().inputs(module, x, timestep, conditioning, overrides)
        # To the latents' dtype, not the network's: the pipeline's latents are float32 beside a bfloat16 network.
        keywords["timestep"] = keywords["timestep"].to(x.dtype)
        return keywords
