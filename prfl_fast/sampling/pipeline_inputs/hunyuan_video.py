"""HunyuanVideo (arXiv 2412.03603) from text; its guidance is embedded, classifier-free guidance comes on top."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from prfl_fast.sampling.pipeline_inputs.arguments import (
    COMMON,
    Arguments,
    assemble,
    encode,
    initial_latents,
    set_timesteps,
)

ARGUMENTS = (
    *COMMON,
    "num_videos_per_prompt",
    "prompt_2",
    "negative_prompt_2",
    "sigmas",
    "true_cfg_scale",
    "pooled_prompt_embeds",
    "prompt_attention_mask",
    "negative_pooled_prompt_embeds",
    "negative_prompt_attention_mask",
    "prompt_template",
)


def text_to_video(pipe: Any, arguments: Arguments) -> Arguments:
    """Inputs of HunyuanVideoPipeline: fp32 latents ``[B, C, F, H, W]``.

    ``guidance_scale`` is embedded in every call. Two calls per step are made with ``true_cfg_scale`` above 1 and a
    negative prompt.
    """
    scale = arguments["true_cfg_scale"]
    has_negative = arguments["negative_prompt"] is not None or (
        arguments["negative_prompt_embeds"] is not None and arguments["negative_pooled_prompt_embeds"] is not None
    )
    conditioning = _text(pipe, arguments, "")
    negative = _text(pipe, arguments, "negative_") if scale > 1 and has_negative else None
    sigmas = arguments["sigmas"]
    if sigmas is None:
        sigmas = np.linspace(1.0, 0.0, arguments["num_inference_steps"] + 1)[:-1]
    set_timesteps(pipe, sigmas=sigmas)
    latents = initial_latents(pipe, arguments, pipe.transformer.config.in_channels)
    if pipe.transformer.config.guidance_embeds:
        scales = [arguments["guidance_scale"]] * latents.shape[0]
        conditioning["guidance"] = (
            torch.tensor(scales, dtype=pipe.transformer.dtype, device=pipe._execution_device) * 1000.0
        )
    return assemble(pipe, arguments, latents, conditioning, negative, scale)


def _text(pipe: Any, arguments: Arguments, prefix: str) -> Arguments:
    """Llama's tokens and mask, CLIP's pooled embedding."""
    if arguments[f"{prefix}prompt_embeds"] is not None and arguments[f"{prefix}prompt_attention_mask"] is None:
        raise ValueError(f"{prefix}prompt_attention_mask: expected together with {prefix}prompt_embeds, got None")
    own = {
        name: arguments[f"{prefix}{name}"]
        for name in ("prompt", "prompt_2", "prompt_embeds", "pooled_prompt_embeds", "prompt_attention_mask")
    }
    both = {name: arguments[name] for name in ("prompt_template", "num_videos_per_prompt", "max_sequence_length")}
    embeds, pooled, mask = encode(pipe, own | both, tuple(own | both))
    dtype = pipe.transformer.dtype
    return {
        "encoder_hidden_states": embeds.to(dtype),
        "encoder_attention_mask": mask.to(dtype),
        "pooled_projections": pooled.to(dtype),
    }
