"""CogVideoX (arXiv 2408.06072) from text, 1.0 and 1.5."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from prfl_fast.sampling.pipeline_inputs.arguments import (
    COMMON,
    Arguments,
    assemble,
    encode,
    initial_latents,
    set_timesteps,
)

_ENCODED = ("prompt", "negative_prompt", "prompt_embeds", "negative_prompt_embeds", "max_sequence_length")
ARGUMENTS = (*COMMON, "use_dynamic_cfg")


def text_to_video(pipe: Any, arguments: Arguments) -> Arguments:
    """Inputs of CogVideoXPipeline: latents ``[B, F, C, H, W]`` in the text embeddings' dtype.

    CogVideoX 1.5 has a multiple of ``patch_size_t`` latent frames; those that the pipeline drops before it decodes
    stand at the front.
    """
    guided = arguments["guidance_scale"] > 1
    embeds, negative_embeds = encode(pipe, arguments, _ENCODED, do_classifier_free_guidance=guided)
    set_timesteps(pipe, arguments["num_inference_steps"])
    config = pipe.transformer.config
    latents = _latents(pipe, arguments, embeds.dtype)
    conditioning = {"encoder_hidden_states": embeds}
    if config.use_rotary_positional_embeddings:
        with torch.no_grad():
            conditioning["image_rotary_emb"] = pipe._prepare_rotary_positional_embeddings(
                arguments["height"], arguments["width"], latents.shape[1], pipe._execution_device
            )
    scale = arguments["guidance_scale"]
    if arguments["use_dynamic_cfg"]:
        scale = _dynamic_scale(scale, pipe.scheduler.timesteps, arguments["num_inference_steps"])
    negative = {"encoder_hidden_states": negative_embeds} if guided else None
    return assemble(pipe, arguments, latents, conditioning, negative, scale)


def default_sizes(pipe: Any) -> Arguments:
    """What the pipeline takes where no size is given: the sizes that the model was trained with."""
    config, spatial = pipe.transformer.config, pipe.vae_scale_factor_spatial
    return {
        "height": config.sample_height * spatial,
        "width": config.sample_width * spatial,
        "num_frames": config.sample_frames,
    }


def _latents(pipe: Any, arguments: Arguments, dtype: torch.dtype) -> Tensor:
    """Noise as the scheduler wants it scaled; latents that the caller gave keep dtype and graph."""
    if arguments["latents"] is not None:
        scaled: Tensor = arguments["latents"].to(pipe._execution_device) * pipe.scheduler.init_noise_sigma
        return scaled
    frames, temporal = arguments["num_frames"], pipe.vae_scale_factor_temporal
    # The latent frames are padded to whole patches.
    missing = -((frames - 1) // temporal + 1) % (pipe.transformer.config.patch_size_t or 1)
    return initial_latents(
        pipe, arguments, pipe.transformer.config.in_channels, num_frames=frames + missing * temporal, dtype=dtype
    )


def _dynamic_scale(scale: float, timesteps: Tensor, num_inference_steps: int) -> Callable[[int], float]:
    """The pipeline's schedule of the guidance scale, ``1 + s (1 - cos(pi ((N - t) / N)^5)) / 2``."""
    given, count = timesteps.tolist(), num_inference_steps

    def at(step: int) -> float:
        return 1 + scale * ((1 - math.cos(math.pi * ((count - given[step]) / count) ** 5.0)) / 2)

    return at
