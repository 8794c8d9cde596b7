"""Frames to latents as the family's pipeline starts from: its VAE's mode, normalised, in the pipeline's layout.

The arithmetic is the inverse of what :mod:`prfl_fast.pixels.families` undoes before it decodes, in the order and dtype
of diffusers' pipelines from images and videos.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

FAMILIES = ("WanPipeline", "HunyuanVideoPipeline", "LTXPipeline", "CogVideoXPipeline")


def family_of(pipe: Any) -> str:
    """Which of :data:`FAMILIES` the pipeline is. Raises TypeError for another one."""
    for cls in type(pipe).__mro__:
        if cls.__name__ in FAMILIES:
            return cls.__name__
    raise TypeError(f"model: expected a pipeline of {', '.join(FAMILIES)}, got {type(pipe).__name__}")


@torch.no_grad()
def encode_frames(pipe: Any, frames: Tensor) -> Tensor:
    """Latents of one clip, a batch of 1 in the VAE's dtype, on the CPU.

    Args:
        pipe: a pipeline of :data:`FAMILIES` with its VAE; of its transformer only the config is read.
        frames: uint8 ``[T, H, W, 3]``.

    Returns:
        ``[1, C, F, h, w]``; CogVideoX ``[1, F, C, h, w]``; LTX packed ``[1, S, C]``.
    """
    family, vae = family_of(pipe), pipe.vae
    # In float32 and in the order of the pipelines' own processing of videos.
    pixels = 2.0 * (frames.to(vae.device).permute(3, 0, 1, 2)[None].float() / 255.0) - 1.0
    mode = vae.encode(pixels.to(vae.dtype)).latent_dist.mode()
    if family == "WanPipeline":
        latents = (mode - _channels(vae.config.latents_mean, mode)) * (1.0 / _channels(vae.config.latents_std, mode))
    elif family == "LTXPipeline":
        mean, std = _channels(vae.latents_mean, mode), _channels(vae.latents_std, mode)
        config = pipe.transformer.config
        latents = pipe._pack_latents(
            (mode - mean) * vae.config.scaling_factor / std, config.patch_size, config.patch_size_t
        )
    elif family == "CogVideoXPipeline":
        latents = _whole_patches(pipe, (vae.config.scaling_factor * mode).transpose(1, 2))
    else:
        latents = mode * vae.config.scaling_factor
    result: Tensor = latents.cpu().contiguous()
    return result


def _channels(values: Any, like: Tensor) -> Tensor:
    return torch.as_tensor(values).view(1, -1, 1, 1, 1).to(like.device, like.dtype)


def _whole_patches(pipe: Any, latents: Tensor) -> Tensor:
    """CogVideoX 1.5 has patches over time: copies of the first frame fill them up in front, where its pipeline drops
    frames before it decodes."""
    missing = -latents.shape[1] % (pipe.transformer.config.patch_size_t or 1)
    return torch.cat([latents[:, :1].expand(-1, missing, -1, -1, -1), latents], dim=1)
