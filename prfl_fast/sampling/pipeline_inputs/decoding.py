"""The decoder that goes with a pipeline's latents: which frames they hold, and in which layout."""

from __future__ import annotations

from typing import Any

from prfl_fast.pixels import PixelDecoder
from prfl_fast.sampling.pipeline_inputs.arguments import Arguments


def check_decode(pipe: Any) -> None:
    """Raises where the pipeline's VAE can't be decoded, before any work."""
    if getattr(pipe, "vae", None) is None:
        raise ValueError(f"decode: this {type(pipe).__name__} holds no vae")
    PixelDecoder(pipe.vae)


def pixel_decoder(pipe: Any, arguments: Arguments, inputs: Arguments) -> PixelDecoder:
    """A decoder of ``inputs["latents"]``.

    Latent frames in front of the video's own are left out, as the pipeline does: VACE's reference images, and those
    that fill CogVideoX 1.5's patches over time.
    """
    if inputs["latents"].ndim == 3:
        frames, height, width = (inputs["conditioning"][name] for name in ("num_frames", "height", "width"))
        return PixelDecoder(pipe.vae, latent_shape=(frames, height, width))
    decoder = PixelDecoder(pipe.vae)
    own = (arguments["num_frames"] - 1) // pipe.vae_scale_factor_temporal + 1
    extra = decoder.count_latent_frames(inputs["latents"]) - own
    return PixelDecoder(pipe.vae, latent_frames=slice(extra, None)) if extra else decoder
