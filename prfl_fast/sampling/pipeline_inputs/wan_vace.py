"""Wan VACE (arXiv 2503.07598): a video to edit, a mask of what is new, reference images."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from prfl_fast.sampling.pipeline_inputs.arguments import (
    Arguments,
    assemble,
    initial_latents,
    num_samples,
    set_timesteps,
)
from prfl_fast.sampling.pipeline_inputs.wan import TEXT_ARGUMENTS, check_sizes, experts, text_conditioning

ARGUMENTS = (*TEXT_ARGUMENTS, "video", "mask", "reference_images", "conditioning_scale")


def edited_video(pipe: Any, arguments: Arguments) -> Arguments:
    """Inputs of WanVACEPipeline: fp32 latents ``[1, C, F, H, W]``, one frame more for each reference image.

    The control ``[1, 2 C + 64, F, H, W]`` (latents of the kept and of the new part, their mask) is conditioning of
    every call. The pipeline makes one video at a time.
    """
    if num_samples(arguments) != 1 or isinstance(arguments["prompt"], list):
        name = "num_videos_per_prompt" if arguments["num_videos_per_prompt"] != 1 else "prompt"
        raise ValueError(f"{name}: {type(pipe).__name__} makes one video of one string at a time, got more")
    check_sizes(pipe, arguments)
    scale = _layer_scales(pipe, arguments["conditioning_scale"])
    conditioning, negative = text_conditioning(pipe, arguments)
    set_timesteps(pipe, arguments["num_inference_steps"])
    control, references = _control(pipe, arguments)
    frames = arguments["num_frames"] + references * pipe.vae_scale_factor_temporal
    latents = initial_latents(pipe, arguments, pipe.transformer.config.in_channels, num_frames=frames)
    conditioning |= {"control_hidden_states": control, "control_hidden_states_scale": scale}
    inputs = assemble(pipe, arguments, latents, conditioning, negative, arguments["guidance_scale"])
    return inputs | experts(pipe, arguments)


def _layer_scales(pipe: Any, given: Any) -> Tensor:
    """One weight for every layer that the control enters."""
    layers = len(pipe.transformer.config.vace_layers)
    scales = torch.as_tensor([given] * layers if isinstance(given, (int, float)) else given)
    if scales.shape != (layers,):
        raise ValueError(
            f"conditioning_scale: expected a number or {layers} of them, one for each layer with control, got "
            f"{tuple(scales.shape)}"
        )
    return scales.to(pipe._execution_device, pipe.transformer.dtype)


@torch.no_grad()
def _control(pipe: Any, arguments: Arguments) -> tuple[Tensor, int]:
    """The control, and how many reference images stand before its frames."""
    device, generator = pipe._execution_device, arguments["generator"]
    video, mask, references = pipe.preprocess_conditions(
        arguments["video"],
        arguments["mask"],
        arguments["reference_images"],
        1,
        arguments["height"],
        arguments["width"],
        arguments["num_frames"],
        torch.float32,
        device,
    )
    latents = pipe.prepare_video_latents(video, mask, references, generator, device)
    control = torch.cat([latents, pipe.prepare_masks(mask, references, generator)], dim=1)
    return control.to(pipe.transformer.dtype), len(references[0])
