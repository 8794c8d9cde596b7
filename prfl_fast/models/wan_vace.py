"""Wan VACE: ``[B, C, F, H, W]``; a control that enters some of the layers beside the latents."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from prfl_fast.models.transformer import WithoutTrunk


class WanVACEAdapter(WithoutTrunk):
    """``WanVACETransformer3DModel``; the control's blocks run before the others."""

    layout = "BCFHW"
    block_lists = (("vace_blocks", "vace_layers"), ("blocks", "num_layers"))
    text_width = "text_dim"
    cast = ("encoder_hidden_states", "control_hidden_states", "control_hidden_states_scale")
    batched = ("encoder_hidden_states", "control_hidden_states")

    @classmethod
    def patch(cls, config: Any) -> dict[str, int]:
        return dict(zip("FHW", config.patch_size, strict=True))

    @classmethod
    def needed(cls, config: Any) -> tuple[str, ...]:
        return ("encoder_hidden_states", "control_hidden_states")

    def validate(self, latents: Tensor, conditioning: Mapping[str, Any], *, prepared: bool) -> None:
        super().validate(latents, conditioning, prepared=prepared)
        config, control = self.inner.config, conditioning.get("control_hidden_states")
        if control is not None:
            expected = (latents.shape[0], config.vace_in_channels)
            # Fewer frames are padded with zeros by the network.
            fits = control.ndim == 5 and control.shape[2:].numel() <= latents.shape[2:].numel()
            if not fits or control.shape[:2] != expected:
                raise ValueError(
                    f"conditioning: 'control_hidden_states': expected [{expected[0]}, {expected[1]}, F, H, W] with no "
                    f"more tokens than the latents {tuple(latents.shape)}, got {tuple(control.shape)}"
                )
        scale, layers = conditioning.get("control_hidden_states_scale"), len(config.vace_layers)
        if scale is not None and scale.shape != (layers,):
            raise ValueError(
                f"conditioning: 'control_hidden_states_scale': expected [{layers}], one for each layer with control, "
                f"got {tuple(scale.shape)}"
            )
