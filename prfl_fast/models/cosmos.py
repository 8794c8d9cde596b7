"""Cosmos: ``[B, C, F, H, W]``; the text may come with an image's tokens, and its timestep is a noise level."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from prfl_fast.models.transformer import WithoutTrunk


class CosmosAdapter(WithoutTrunk):
    """``CosmosTransformer3DModel``, called as the first generation's pipelines do: the EDM scheduler makes the
    network's timestep, scales its input and preconditions its prediction.

    The later generations' pipelines do that themselves, from ``scheduler.sigmas``. For them the timestep has to come
    from ``prepare_input``; where the prediction is preconditioned too, from a callable around the transformer.
    """

    layout = "BCFHW"
    block_lists = (("transformer_blocks", "num_layers"),)
    text_width = None
    cast = batched = ()

    @classmethod
    def timestep(cls, timestep: Tensor, dtype: torch.dtype) -> Tensor:
        return timestep.to(dtype)

    @classmethod
    def channels(cls, config: Any) -> tuple[int, int]:
        return config.out_channels, config.out_channels  # condition_mask and padding_mask join inside

    @classmethod
    def patch(cls, config: Any) -> dict[str, int]:
        return dict(zip("FHW", config.patch_size, strict=True))

    @classmethod
    def needed(cls, config: Any) -> tuple[str, ...]:
        return ("encoder_hidden_states", "padding_mask") if config.concat_padding_mask else ("encoder_hidden_states",)

    def validate(self, latents: Tensor, conditioning: Mapping[str, Any], *, prepared: bool) -> None:
        super().validate(latents, conditioning, prepared=prepared)
        # Only the first generation has a learned table of positions.
        if self.inner.config.extra_pos_embed_type is None and not prepared:
            raise ValueError(
                "prepare_input: this Cosmos takes noise levels as timesteps, not the scheduler's; expected a function "
                "that gives 'timestep', or as transformer a callable that converts timestep and prediction as its "
                "pipeline does; got None"
            )
