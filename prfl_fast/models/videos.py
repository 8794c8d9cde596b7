"""Video transformers of which no reward reads the token stream yet: how their pipelines call them."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from prfl_fast.models.transformer import WithoutTrunk


class _NetworkTimestep(WithoutTrunk):
    """The pipeline casts the timestep to the network's dtype: in bfloat16 the steps are rounded ones."""

    block_lists: ClassVar[tuple[tuple[str, str], ...]] = (("transformer_blocks", "num_layers"),)

    @classmethod
    def timestep(cls, timestep: Tensor, dtype: torch.dtype) -> Tensor:
        return timestep.to(dtype)


class HunyuanVideo15Adapter(_NetworkTimestep):
    """``HunyuanVideo15Transformer3DModel``: ``[B, C, F, H, W]``; ``prepare_input`` adds first frame and mask."""

    layout = "BCFHW"
    text_width = "text_embed_dim"
    cast = ("encoder_hidden_states", "encoder_hidden_states_2", "image_embeds")
    batched = (*cast, "encoder_attention_mask", "encoder_attention_mask_2")

    @classmethod
    def patch(cls, config: Any) -> dict[str, int]:
        return {"F": config.patch_size_t, "H": config.patch_size, "W": config.patch_size}

    @classmethod
    def needed(cls, config: Any) -> tuple[str, ...]:
        return cls.batched


class MochiAdapter(_NetworkTimestep):
    """``MochiTransformer3DModel``: ``[B, C, F, H, W]``."""

    layout = "BCFHW"
    text_width = "text_embed_dim"
    batched = ("encoder_hidden_states", "encoder_attention_mask")
    float_prediction = True

    @classmethod
    def patch(cls, config: Any) -> dict[str, int]:
        return {"H": config.patch_size, "W": config.patch_size}

    @classmethod
    def needed(cls, config: Any) -> tuple[str, ...]:
        return cls.batched


class EasyAnimateAdapter(_NetworkTimestep):
    """``EasyAnimateTransformer3DModel``: ``[B, C, F, H, W]``; it joins ``inpaint_latents`` to the channels itself."""

    layout = "BCFHW"
    text_width = "text_embed_dim"
    cast = batched = ("encoder_hidden_states", "encoder_hidden_states_t5", "inpaint_latents", "control_latents")

    @classmethod
    def channels(cls, config: Any) -> tuple[int, int]:
        return config.out_channels, config.out_channels

    @classmethod
    def patch(cls, config: Any) -> dict[str, int]:
        return {"H": config.patch_size, "W": config.patch_size}


class Kandinsky5Adapter(_NetworkTimestep):
    """``Kandinsky5Transformer3DModel``: ``[B, F, H, W, C]``; text blocks run before the visual ones."""

    layout = "BFHWC"
    block_lists = (
        ("text_transformer_blocks", "num_text_blocks"),
        ("visual_transformer_blocks", "num_visual_blocks"),
    )
    text_width = "in_text_dim"
    cast = batched = ("encoder_hidden_states", "pooled_projections")

    @classmethod
    def channels(cls, config: Any) -> tuple[int, int]:
        made = config.out_visual_dim
        return made, 2 * config.in_visual_dim + 1 if config.visual_cond else made

    @classmethod
    def patch(cls, config: Any) -> dict[str, int]:
        return dict(zip("FHW", config.patch_size, strict=True))

    @classmethod
    def needed(cls, config: Any) -> tuple[str, ...]:
        return ("encoder_hidden_states", "pooled_projections", "visual_rope_pos", "text_rope_pos")


class AllegroAdapter(WithoutTrunk):
    """``AllegroTransformer3DModel``: ``[B, C, F, H, W]``; its pipeline gives the text as ``[B, 1, tokens, D]``."""

    layout = "BCFHW"
    block_lists = (("transformer_blocks", "num_layers"),)
    text_width = None
    batched = ("encoder_hidden_states", "encoder_attention_mask")

    @classmethod
    def patch(cls, config: Any) -> dict[str, int]:
        return {"F": config.patch_size_t, "H": config.patch_size, "W": config.patch_size}

    @classmethod
    def needed(cls, config: Any) -> tuple[str, ...]:
        return ("encoder_hidden_states", "image_rotary_emb")


class ConsisIDAdapter(WithoutTrunk):
    """``ConsisIDTransformer3DModel``: ``[B, F, C, H, W]``; ``prepare_input`` adds the first frame's channels."""

    layout = "BFCHW"
    block_lists = (("transformer_blocks", "num_layers"),)
    text_width = "text_embed_dim"
    float_prediction = True

    @classmethod
    def patch(cls, config: Any) -> dict[str, int]:
        return {"H": config.patch_size, "W": config.patch_size}

    @classmethod
    def needed(cls, config: Any) -> tuple[str, ...]:
        rotary = ("image_rotary_emb",) if config.use_rotary_positional_embeddings else ()
        face = ("id_cond", "id_vit_hidden") if config.is_train_face else ()
        return ("encoder_hidden_states", *rotary, *face)


class SanaVideoAdapter(WithoutTrunk):
    """``SanaVideoTransformer3DModel``: ``[B, C, F, H, W]``; a learned variance in its output is left out."""

    layout = "BCFHW"
    block_lists = (("transformer_blocks", "num_layers"),)
    text_width = "caption_channels"
    batched = ("encoder_hidden_states", "encoder_attention_mask", "guidance")
    float_prediction = True

    @classmethod
    def channels(cls, config: Any) -> tuple[int, int]:
        return config.in_channels, config.in_channels

    @classmethod
    def patch(cls, config: Any) -> dict[str, int]:
        return dict(zip("FHW", config.patch_size, strict=True))

    def prediction(self, output: Any) -> Tensor:
        return super().prediction(output)[:, : self.inner.config.in_channels]
