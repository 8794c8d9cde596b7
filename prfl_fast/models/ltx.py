"""LTX-Video: packed latents ``[B, S, C]``, one token per latent pixel."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from prfl_fast.models.transformer import TransformerAdapter


class LTXAdapter(TransformerAdapter):
    """``LTXVideoTransformer3DModel``; ``num_frames``, ``height``, ``width`` of the latents place the tokens."""

    layout = "BSC"
    block_lists = (("transformer_blocks", "num_layers"),)
    head = ("norm_out", "proj_out", "scale_shift_table")
    text_width = "caption_channels"
    batched = ("encoder_hidden_states", "encoder_attention_mask")
    float_prediction = True

    @classmethod
    def patch(cls, config: Any) -> dict[str, int]:
        return {}  # packing cuts the patches

    def validate(self, latents: Tensor, conditioning: Mapping[str, Any], *, prepared: bool) -> None:
        super().validate(latents, conditioning, prepared=prepared)
        if prepared or conditioning.get("video_coords") is not None:
            return
        given = [conditioning.get(name) for name in ("num_frames", "height", "width")]
        sizes = [size for size in given if isinstance(size, int) and size > 0]
        if len(sizes) < 3:
            raise ValueError(
                "conditioning: LTX needs 'num_frames', 'height', 'width' (of the latents, whole numbers), or "
                f"'video_coords'; got {given}"
            )
        frames, height, width = sizes
        if frames * height * width != latents.shape[1]:
            raise ValueError(
                f"latents: expected num_frames x height x width = {frames} x {height} x {width} tokens in [B, S, C], "
                f"got {tuple(latents.shape)}"
            )
