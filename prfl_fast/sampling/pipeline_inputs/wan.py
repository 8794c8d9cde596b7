"""Wan (arXiv 2503.20314) from text and from images: 2.1, the two experts of 2.2, and its 5B model."""

from __future__ import annotations

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
    num_samples,
    set_timesteps,
)

TEXT_ARGUMENTS = (*COMMON, "num_videos_per_prompt", "guidance_scale_2")
IMAGE_ARGUMENTS = (*TEXT_ARGUMENTS, "image", "last_image", "image_embeds")

_ENCODED = (
    "prompt",
    "negative_prompt",
    "num_videos_per_prompt",
    "prompt_embeds",
    "negative_prompt_embeds",
    "max_sequence_length",
)


def text_to_video(pipe: Any, arguments: Arguments) -> Arguments:
    """Inputs of WanPipeline: fp32 latents ``[B, C, F, H, W]``."""
    check_sizes(pipe, arguments)
    conditioning, negative = text_conditioning(pipe, arguments)
    set_timesteps(pipe, arguments["num_inference_steps"])
    latents = initial_latents(pipe, arguments, pipe.transformer.config.in_channels)
    inputs = assemble(pipe, arguments, latents, conditioning, negative, arguments["guidance_scale"])
    inputs |= experts(pipe, arguments)
    if pipe.config.get("expand_timesteps"):
        inputs["prepare_input"] = _token_timesteps(pipe, torch.ones(latents.shape[2:], device=latents.device))
    return inputs


def image_to_video(pipe: Any, arguments: Arguments) -> Arguments:
    """Inputs of WanImageToVideoPipeline.

    The condition ``[B, 4 + C, F, H, W]`` (mask of the known frames, their latents) joins the channels of every input;
    the 5B model instead keeps its first latent frame as it is, at timestep 0.
    """
    check_sizes(pipe, arguments)
    conditioning, negative = text_conditioning(pipe, arguments)
    dtype, device = pipe.transformer.dtype, pipe._execution_device
    if pipe.transformer.config.image_dim is not None:
        embeds = arguments["image_embeds"]
        if embeds is None:
            images = [arguments[name] for name in ("image", "last_image") if arguments[name] is not None]
            with torch.no_grad():
                embeds = pipe.encode_image(images if len(images) == 2 else images[0], device)
        conditioning["encoder_hidden_states_image"] = embeds.repeat(num_samples(arguments), 1, 1).to(dtype)
    set_timesteps(pipe, arguments["num_inference_steps"])
    with torch.no_grad():
        prepared = pipe.prepare_latents(
            _pixels(pipe, arguments, "image"),
            batch_size=num_samples(arguments),
            num_channels_latents=pipe.vae.config.z_dim,
            height=arguments["height"],
            width=arguments["width"],
            num_frames=arguments["num_frames"],
            dtype=torch.float32,
            device=device,
            generator=arguments["generator"],
            latents=arguments["latents"],
            last_image=None if arguments["last_image"] is None else _pixels(pipe, arguments, "last_image"),
        )
    latents, condition = prepared[:2]
    if arguments["latents"] is not None:
        latents = arguments["latents"].to(latents)  # with its graph
    extra: Arguments = {}
    if pipe.config.get("expand_timesteps"):
        mask = prepared[2]
        latents = (1 - mask) * condition + mask * latents
        extra = {"latent_mask": mask.bool(), "prepare_input": _token_timesteps(pipe, mask[0, 0])}
    else:
        extra = {"prepare_input": _joined_channels(condition, dtype)}
    inputs = assemble(pipe, arguments, latents, conditioning, negative, arguments["guidance_scale"])
    return inputs | experts(pipe, arguments) | extra


def check_sizes(pipe: Any, arguments: Arguments) -> None:
    """What the pipeline would round, with a warning in its log."""
    temporal, spatial = pipe.vae_scale_factor_temporal, pipe.vae_scale_factor_spatial
    frames = arguments["num_frames"]
    if frames < 1 or frames % temporal != 1 % temporal:
        raise ValueError(f"num_frames: expected a multiple of {temporal} plus 1, got {frames}")
    for name, patch in zip(("height", "width"), pipe.transformer.config.patch_size[1:], strict=True):
        if arguments[name] % (spatial * patch):
            raise ValueError(f"{name}: expected a multiple of {spatial * patch}, got {arguments[name]}")


def text_conditioning(pipe: Any, arguments: Arguments) -> tuple[Arguments, Arguments | None]:
    """Text in the network's dtype, positive and, under guidance, negative."""
    guided = arguments["guidance_scale"] > 1
    texts = encode(pipe, arguments, _ENCODED, do_classifier_free_guidance=guided)
    dtype = pipe.transformer.dtype
    positive, negative = ({"encoder_hidden_states": t.to(dtype)} if t is not None else None for t in texts)
    assert positive is not None
    return positive, negative if guided else None


def experts(pipe: Any, arguments: Arguments) -> Arguments:
    """Wan 2.2's second expert with its boundary and guidance scale; nothing where the pipeline has one."""
    boundary = pipe.config.get("boundary_ratio")
    if boundary is None:
        return {}
    if pipe.transformer_2 is None:
        raise ValueError(f"pipe: boundary_ratio={boundary} needs a transformer_2, but the pipeline holds none")
    inputs = {"transformer_2": pipe.transformer_2, "boundary_ratio": boundary}
    if arguments["guidance_scale"] > 1:
        scale = arguments["guidance_scale_2"]
        inputs["guidance_scale_2"] = arguments["guidance_scale"] if scale is None else scale
    return inputs


def _pixels(pipe: Any, arguments: Arguments, name: str) -> Tensor:
    pixels: Tensor = pipe.video_processor.preprocess(
        arguments[name], height=arguments["height"], width=arguments["width"]
    )
    return pixels.to(pipe._execution_device, dtype=torch.float32)


def _token_timesteps(pipe: Any, mask: Tensor) -> Callable[[Tensor, Tensor, int], Arguments]:
    """One timestep per token, 0 where ``mask`` [F, H, W] is 0: float32 ``[B, tokens]``."""
    _, height, width = pipe.transformer.config.patch_size
    tokens = mask[:, ::height, ::width].flatten()

    def prepare(x: Tensor, timestep: Tensor, step: int) -> Arguments:
        return {"timestep": (tokens * timestep).unsqueeze(0).expand(x.shape[0], -1)}

    return prepare


def _joined_channels(condition: Tensor, dtype: torch.dtype) -> Callable[[Tensor, Tensor, int], Arguments]:
    def prepare(x: Tensor, timestep: Tensor, step: int) -> Arguments:
        return {"hidden_states": torch.cat([x, condition], dim=1).to(dtype)}

    return prepare
