"""CogVideoX: ``[B, F, C, H, W]``, text and video tokens in one sequence."""

from __future__ import annotations

from typing import Any

from prfl_fast.models.transformer import TransformerAdapter


class CogVideoXAdapter(TransformerAdapter):
    """``CogVideoXTransformer3DModel``, 1.0 and 1.5; the trunk gives video tokens only."""

    layout = "BFCHW"
    block_lists = (("transformer_blocks", "num_layers"),)
    head = ("norm_final", "norm_out", "proj_out")
    text_width = "text_embed_dim"
    float_prediction = True

    @classmethod
    def patch(cls, config: Any) -> dict[str, int]:
        return {"F": config.patch_size_t or 1, "H": config.patch_size, "W": config.patch_size}

    @classmethod
    def needed(cls, config: Any) -> tuple[str, ...]:
        rotary = ("image_rotary_emb",) if config.use_rotary_positional_embeddings else ()
        offset = ("ofs",) if config.ofs_embed_dim else ()
        return ("encoder_hidden_states", *rotary, *offset)
