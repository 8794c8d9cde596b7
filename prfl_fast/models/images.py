"""Text-to-image transformers: Stable Diffusion 3, Flux, Qwen-Image."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from prfl_fast.models.transformer import WithoutTrunk


class SD3Adapter(WithoutTrunk):
    """``SD3Transformer2DModel``: ``[B, C, H, W]``."""

    layout = "BCHW"
    block_lists = (("transformer_blocks", "num_layers"),)
    text_width = "joint_attention_dim"
    cast = batched = ("encoder_hidden_states", "pooled_projections")

    @classmethod
    def patch(cls, config: Any) -> dict[str, int]:
        return {"H": config.patch_size, "W": config.patch_size}

    @classmethod
    def needed(cls, config: Any) -> tuple[str, ...]:
        return ("encoder_hidden_states", "pooled_projections")


class FluxAdapter(WithoutTrunk):
    """``FluxTransformer2DModel``: packed ``[B, S, C]``; its timestep is in 0..1."""

    layout = "BSC"
    block_lists = (("transformer_blocks", "num_layers"), ("single_transformer_blocks", "num_single_layers"))
    text_width = "joint_attention_dim"
    cast = ("encoder_hidden_states", "pooled_projections")
    batched = ("encoder_hidden_states", "pooled_projections", "guidance")

    @classmethod
    def timestep(cls, timestep: Tensor, dtype: torch.dtype) -> Tensor:
        return timestep.to(dtype) / 1000

    @classmethod
    def needed(cls, config: Any) -> tuple[str, ...]:
        always = ("encoder_hidden_states", "pooled_projections", "img_ids", "txt_ids")
        return (*always, "guidance") if config.guidance_embeds else always


class QwenImageAdapter(WithoutTrunk):
    """``QwenImageTransformer2DModel``: packed ``[B, S, C]``; its timestep is in 0..1.

    Its pipeline gives the guided prediction the norm of the conditional one: a ``guidance_fn``.
    """

    layout = "BSC"
    block_lists = (("transformer_blocks", "num_layers"),)
    text_width = "joint_attention_dim"
    batched = ("encoder_hidden_states", "encoder_hidden_states_mask", "guidance")

    @classmethod
    def timestep(cls, timestep: Tensor, dtype: torch.dtype) -> Tensor:
        return timestep.to(dtype) / 1000

    @classmethod
    def channels(cls, config: Any) -> tuple[int, int]:
        return config.in_channels, config.in_channels  # out_channels is that of one pixel of a packed patch

    @classmethod
    def needed(cls, config: Any) -> tuple[str, ...]:
        return ("encoder_hidden_states", "img_shapes")
