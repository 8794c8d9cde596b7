"""Per family of VAE: the latents as its pipeline hands them to ``vae.decode``, and the decoding itself.

Every function here repeats the arithmetic of the family's diffusers pipeline in its order and dtype, so that the frames
are the pipeline's bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from prfl_fast.pixels.chunks import checkpointed_calls, decode_in_chunks


@dataclass(frozen=True)
class Family:
    """One kind of VAE.

    Attributes:
        channels: name of the config's entry that holds the latent channels.
        unnormalise: ``(vae, latents [B, C, F, H, W]) -> latents`` of the same shape, in the VAE's dtype.
        decode: ``(vae, those) -> frames [B, 3, T, H', W']``, -1 for black and 1 for white.
        time_dim: dimension of the latents' frames in the pipeline's layout.
        packed: the pipeline's latents are ``[B, F H W, C]``.
    """

    channels: str
    unnormalise: Callable[[Any, Tensor], Tensor]
    decode: Callable[[Any, Tensor], Tensor]
    time_dim: int = 2
    packed: bool = False


def _per_channel(values: Any, like: Tensor) -> Tensor:
    return torch.as_tensor(values).view(1, -1, 1, 1, 1).to(like.device, like.dtype)


def _wan_unnormalise(vae: Any, latents: Tensor) -> Tensor:
    latents = latents.to(vae.dtype)
    mean, std = _per_channel(vae.config.latents_mean, latents), _per_channel(vae.config.latents_std, latents)
    # Divided by the reciprocal, as the pipeline does: a product would round otherwise.
    return latents / (1.0 / std) + mean


def _scaled_unnormalise(vae: Any, latents: Tensor) -> Tensor:
    scaled: Tensor = latents.to(vae.dtype) / vae.config.scaling_factor
    return scaled


def _cogvideox_unnormalise(vae: Any, latents: Tensor) -> Tensor:
    scaled: Tensor = 1 / vae.config.scaling_factor * latents
    return scaled.to(vae.dtype)


def _ltx_unnormalise(vae: Any, latents: Tensor) -> Tensor:
    mean, std = _per_channel(vae.latents_mean, latents), _per_channel(vae.latents_std, latents)
    scaled: Tensor = latents * std / vae.config.scaling_factor + mean
    return scaled.to(vae.dtype)


def _whole(vae: Any, latents: Tensor) -> Tensor:
    """``vae.decode`` as it is, tiles and slices too, each call of its decoder a checkpoint."""
    with checkpointed_calls(vae.decoder):
        frames: Tensor = vae.decode(latents, return_dict=False)[0]
    return frames


def _ltx_decode(vae: Any, latents: Tensor) -> Tensor:
    # A decoder that is conditioned on a noise level is given 0, the pipeline's default, and latents without noise.
    level = latents.new_zeros(latents.shape[0]) if vae.config.timestep_conditioning else None
    with checkpointed_calls(vae.decoder):
        frames: Tensor = vae.decode(latents, level, return_dict=False)[0]
    return frames


def _sample_by_sample(vae: Any, latents: Tensor, decode: Callable[[Any, Tensor], Tensor]) -> Tensor:
    if vae.use_slicing and latents.shape[0] > 1:
        return torch.cat([decode(vae, part) for part in latents.split(1)])
    return decode(vae, latents)


def _wake(vae: Any) -> None:
    """What ``vae.decode`` does first: bring an offloaded model to its device."""
    hook = getattr(vae, "_hf_hook", None)
    if hook is not None and hasattr(hook, "pre_forward"):
        hook.pre_forward(vae)


def _wan_decode(vae: Any, latents: Tensor) -> Tensor:
    if vae.use_tiling:
        return _whole(vae, latents)
    _wake(vae)
    return _sample_by_sample(vae, latents, _wan_chunks)


def _wan_chunks(vae: Any, latents: Tensor) -> Tensor:
    """One latent frame at a time: 1 frame of pixels for the first, ``scale_factor_temporal`` for each of the others."""
    from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d, unpatchify

    patch = vae.config.patch_size

    def step(index: int, chunk: Tensor, cache: list[Any]) -> tuple[Tensor, list[Any]]:
        frames = vae.decoder(chunk, feat_cache=cache, feat_idx=[0], first_chunk=index == 0)
        if patch is not None:
            frames = unpatchify(frames, patch_size=patch)
        return frames.clamp(-1.0, 1.0), cache

    convolutions = sum(isinstance(module, WanCausalConv3d) for module in vae.decoder.modules())
    return decode_in_chunks(step, vae.post_quant_conv(latents).split(1, 2), [None] * convolutions)


def _cogvideox_decode(vae: Any, latents: Tensor) -> Tensor:
    if vae.use_tiling:
        return _whole(vae, latents)
    _wake(vae)
    return _sample_by_sample(vae, latents, _cogvideox_chunks)


def _cogvideox_chunks(vae: Any, latents: Tensor) -> Tensor:
    """A group of latent frames at a time; what does not fill a group joins the first, as the VAE was trained."""

    def step(index: int, chunk: Tensor, cache: Any) -> tuple[Tensor, Any]:
        if vae.post_quant_conv is not None:
            chunk = vae.post_quant_conv(chunk)
        frames, after = vae.decoder(chunk, conv_cache=cache)
        return frames, after

    return decode_in_chunks(step, latents.split(_groups(latents.shape[2], vae.num_latent_frames_batch_size), 2), None)


def _groups(frames: int, size: int) -> Sequence[int]:
    if frames < size:
        return [frames]
    return [size + frames % size, *[size] * (frames // size - 1)]


# By the class whose decoder it is; a subclass of one is taken for it.
FAMILIES = {
    "AutoencoderKLWan": Family("z_dim", _wan_unnormalise, _wan_decode),
    "AutoencoderKLHunyuanVideo": Family("latent_channels", _scaled_unnormalise, _whole),
    "AutoencoderKLLTXVideo": Family("latent_channels", _ltx_unnormalise, _ltx_decode, packed=True),
    "AutoencoderKLCogVideoX": Family("latent_channels", _cogvideox_unnormalise, _cogvideox_decode, time_dim=1),
}


def family_of(vae: Any) -> Family | None:
    """The family of a VAE; None where there is none."""
    return next((FAMILIES[c.__name__] for c in type(vae).__mro__ if c.__name__ in FAMILIES), None)
