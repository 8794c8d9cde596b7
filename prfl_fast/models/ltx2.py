"""LTX-2: packed video and audio latents in one tensor ``[B, S + A, C]``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from prfl_fast.models.transformer import WithoutTrunk


class LTX2Adapter(WithoutTrunk):
    """``LTX2VideoTransformer3DModel``: S video tokens, then A = ``audio_num_frames`` audio tokens.

    Each looks at the other in every block, and their schedulers are the same, so that both are sampled and
    differentiated as one; a reward on the video takes ``latents[:, :S]``. Where audio and video are guided by different
    scales, ``guidance_fn`` sees both.
    """

    layout = "BSC"
    block_lists = (("transformer_blocks", "num_layers"),)
    text_width = None
    cast = batched = ("encoder_hidden_states", "audio_encoder_hidden_states")
    float_prediction = True

    def __init__(self, network: Any) -> None:
        super().__init__(network)
        self._required = tuple(name for name in self._required if name != "audio_hidden_states")

    @classmethod
    def needed(cls, config: Any) -> tuple[str, ...]:
        return cls.batched

    @classmethod
    def inputs(
        cls,
        module: torch.nn.Module,
        x: Tensor,
        timestep: Tensor,
        conditioning: Mapping[str, Any],
        overrides: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        keywords = super().inputs(module, x, timestep, conditioning, overrides)
        audio = keywords["audio_num_frames"]
        both = keywords["hidden_states"]
        keywords["hidden_states"], keywords["audio_hidden_states"] = both.split([both.shape[1] - audio, audio], dim=1)
        # A timestep per video token is not one per audio token.
        common = timestep.expand(x.shape[0])
        return {"sigma": common, "audio_timestep": common, **keywords}

    def validate(self, latents: Tensor, conditioning: Mapping[str, Any], *, prepared: bool) -> None:
        config = self.inner.config
        if config.in_channels != config.audio_in_channels:
            raise ValueError(
                f"transformer: {self._name} with {config.in_channels} channels of video and {config.audio_in_channels} "
                "of audio can't have both in one tensor; expected a callable around it that takes them apart"
            )
        if "audio_hidden_states" in conditioning:
            raise ValueError(
                "conditioning: 'audio_hidden_states' are the last tokens of the latents, sampled with the video; "
                "prepare_input can replace 'hidden_states', which holds both"
            )
        super().validate(latents, conditioning, prepared=prepared)
        given = [conditioning.get(name) for name in ("num_frames", "height", "width", "audio_num_frames")]
        sizes = [size for size in given if isinstance(size, int) and size > 0]
        if len(sizes) < 4:
            raise ValueError(
                "conditioning: LTX-2 needs 'num_frames', 'height', 'width', 'audio_num_frames' (of the latents, whole "
                f"numbers), got {given}"
            )
        frames, height, width, audio = sizes
        if frames * height * width + audio != latents.shape[1]:
            raise ValueError(
                f"latents: expected num_frames x height x width + audio_num_frames = {frames} x {height} x {width} + "
                f"{audio} tokens in [B, S + A, C], got {tuple(latents.shape)}"
            )

    def prediction(self, output: Any) -> Tensor:
        video, audio = output
        return torch.cat([video, audio], dim=1)
