"""Wan 2.1 and 2.2, SkyReels V2: ``[B, C, F, H, W]``; text, image and first-last-frame to video."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from prfl_fast.models.base import check_batch
from prfl_fast.models.transformer import TransformerAdapter


class WanAdapter(TransformerAdapter):
    """``WanTransformer3DModel``. Two experts are two adapters; 5B's per-token timesteps come from ``prepare_input``."""

    layout = "BCFHW"
    block_lists = (("blocks", "num_layers"),)
    head = ("norm_out", "proj_out", "scale_shift_table")
    text_width = "text_dim"
    cast = ("encoder_hidden_states", "encoder_hidden_states_image")

    @classmethod
    def patch(cls, config: Any) -> dict[str, int]:
        return dict(zip("FHW", config.patch_size, strict=True))

    def validate(self, latents: Tensor, conditioning: Mapping[str, Any], *, prepared: bool) -> None:
        super().validate(latents, conditioning, prepared=prepared)
        config = self.inner.config
        image = conditioning.get("encoder_hidden_states_image")
        if image is None:
            return
        if config.image_dim is None:
            raise ValueError("conditioning: 'encoder_hidden_states_image': this Wan has no image embedder")
        # Under a positional table (first and last frame) the two images of a sample stand one after the other.
        images = 1 if config.pos_embed_seq_len is None else 2
        check_batch(conditioning, "encoder_hidden_states_image", images * latents.shape[0])


class SkyReelsV2Adapter(WanAdapter):
    """``SkyReelsV2Transformer3DModel``: Wan's calls; diffusion forcing's timesteps ``[B, F]`` of equal frames come from
    ``prepare_input``, beside ``enable_diffusion_forcing``."""

    @classmethod
    def needed(cls, config: Any) -> tuple[str, ...]:
        return ("encoder_hidden_states", "fps") if config.inject_sample_info else ("encoder_hidden_states",)
