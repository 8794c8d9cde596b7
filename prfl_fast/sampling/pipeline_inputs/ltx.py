"""LTX-Video (arXiv 2501.00103) from text or a first frame: packed latents, a schedule shifted by their number."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from prfl_fast.sampling.guidance import GuidanceFunction
from prfl_fast.sampling.pipeline_inputs.arguments import (
    COMMON,
    Arguments,
    assemble,
    encode,
    initial_latents,
    num_samples,
    set_timesteps,
)

_ENCODED = (
    "prompt",
    "negative_prompt",
    "num_videos_per_prompt",
    "prompt_embeds",
    "negative_prompt_embeds",
    "prompt_attention_mask",
    "negative_prompt_attention_mask",
    "max_sequence_length",
)
ARGUMENTS = (*dict.fromkeys((*COMMON, *_ENCODED)), "frame_rate", "guidance_rescale")
IMAGE_ARGUMENTS = (*ARGUMENTS, "image")


def text_to_video(pipe: Any, arguments: Arguments) -> Arguments:
    """Inputs of LTXPipeline: fp32 latents ``[B, S, C]``, S = frames x height x width in latents."""
    embeds = _text(pipe, arguments)
    latents = initial_latents(pipe, arguments, pipe.transformer.config.in_channels)
    return _inputs(pipe, arguments, latents, embeds)


def image_to_video(pipe: Any, arguments: Arguments) -> Arguments:
    """Inputs of LTXImageToVideoPipeline: as from text, but the first frame's tokens stay as they are, at timestep 0.

    Latents that the caller gave hold that frame already; the image is then not needed.
    """
    embeds = _text(pipe, arguments)
    pixels = None
    if arguments["latents"] is None:
        pixels = pipe.video_processor.preprocess(
            arguments["image"], height=arguments["height"], width=arguments["width"]
        ).to(device=pipe._execution_device, dtype=embeds[0].dtype)
    with torch.no_grad():
        latents, known = pipe.prepare_latents(
            pixels,
            num_samples(arguments),
            pipe.transformer.config.in_channels,
            arguments["height"],
            arguments["width"],
            arguments["num_frames"],
            torch.float32,
            pipe._execution_device,
            arguments["generator"],
            arguments["latents"],
        )
    if arguments["latents"] is not None:
        latents = arguments["latents"].to(latents)  # with its graph
    moving = 1 - known

    def prepare(x: Tensor, timestep: Tensor, step: int) -> Arguments:
        return {"timestep": timestep.expand(x.shape[0]).unsqueeze(-1) * moving}

    extra = {"prepare_input": prepare, "latent_mask": moving.bool().unsqueeze(-1)}
    return _inputs(pipe, arguments, latents, embeds) | extra


def _text(pipe: Any, arguments: Arguments) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Embeddings and masks, positive and negative."""
    guided = arguments["guidance_scale"] > 1
    embeds: tuple[Tensor, Tensor, Tensor | None, Tensor | None] = encode(
        pipe, arguments, _ENCODED, do_classifier_free_guidance=guided
    )
    return embeds


def _inputs(
    pipe: Any,
    arguments: Arguments,
    latents: Tensor,
    text: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
) -> Arguments:
    embeds, mask, negative_embeds, negative_mask = text
    guided = arguments["guidance_scale"] > 1
    temporal, spatial = pipe.vae_temporal_compression_ratio, pipe.vae_spatial_compression_ratio
    frames = (arguments["num_frames"] - 1) // temporal + 1
    height, width = arguments["height"] // spatial, arguments["width"] // spatial
    steps = arguments["num_inference_steps"]
    set_timesteps(
        pipe, sigmas=np.linspace(1.0, 1 / steps, steps), mu=_shift(pipe.scheduler.config, frames * height * width)
    )
    conditioning = {
        "encoder_hidden_states": embeds,
        "encoder_attention_mask": mask,
        "num_frames": frames,
        "height": height,
        "width": width,
        "rope_interpolation_scale": (temporal / arguments["frame_rate"], spatial, spatial),
    }
    negative = {"encoder_hidden_states": negative_embeds, "encoder_attention_mask": negative_mask} if guided else None
    inputs = assemble(pipe, arguments, latents, conditioning, negative, arguments["guidance_scale"])
    if guided and arguments["guidance_rescale"] > 0:
        inputs["guidance_fn"] = _rescaled(arguments["guidance_scale"], arguments["guidance_rescale"])
    return inputs


def _shift(config: Any, tokens: int) -> float:
    """mu, linear in the number of tokens (arXiv 2403.03206, section 5.3.2)."""
    fewest, most = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    slope = (high - low) / (most - fewest)
    return float(tokens * slope + (low - slope * fewest))


def _rescaled(scale: float, factor: float) -> GuidanceFunction:
    """Guidance whose standard deviation is drawn towards the conditional one's (arXiv 2305.08891, section 3.4)."""

    def combine(conditional: Tensor, unconditional: Tensor, step: int) -> Tensor:
        guided = unconditional + scale * (conditional - unconditional)
        dims = tuple(range(1, guided.ndim))
        ratio = conditional.std(dim=dims, keepdim=True) / guided.std(dim=dims, keepdim=True)
        return factor * (guided * ratio) + (1 - factor) * guided

    return combine
