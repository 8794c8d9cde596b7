"""Tiny VAEs with random weights, what their pipelines do with latents, and the plain decode that ours must equal."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

CHANNELS = 4


def wan(**config: Any) -> Any:
    import diffusers

    sizes = {"base_dim": 3, "z_dim": CHANNELS, "dim_mult": [1, 2], "num_res_blocks": 1, "temperal_downsample": [True]}
    noise = {"latents_mean": [0.3, -0.2, 0.1, 0.4], "latents_std": [1.3, 0.7, 2.1, 0.9]}
    return ready(diffusers.AutoencoderKLWan(**{**sizes, "scale_factor_temporal": 2, **noise, **config}))


def wan_two_rates() -> Any:
    """As published: two doublings of time."""
    return wan(dim_mult=[1, 1, 2], temperal_downsample=[True, True], scale_factor_temporal=4)


def wan_residual() -> Any:
    """Wan 2.2 5B: residual blocks, patches of pixels. Time doubles where channels are halved, so that the two frames
    that a shortcut makes of one differ, and it matters which of them the first chunk drops."""
    changes = {"is_residual": True, "patch_size": 2, "in_channels": 12, "out_channels": 12, "scale_factor_spatial": 16}
    return wan(base_dim=4, dim_mult=[1, 1, 2, 2], temperal_downsample=[True, False, False], **changes)


def hunyuan() -> Any:
    import diffusers

    vae = diffusers.AutoencoderKLHunyuanVideo(
        latent_channels=CHANNELS, block_out_channels=(2, 2, 2, 2), layers_per_block=1, norm_num_groups=1
    )
    # Groups of two latent frames, so that a short video has several.
    vae.tile_sample_min_num_frames, vae.tile_sample_stride_num_frames = 8, 4
    return ready(vae)


def ltx(timestep_conditioning: bool = False) -> Any:
    import diffusers

    vae = diffusers.AutoencoderKLLTXVideo(
        latent_channels=CHANNELS,
        block_out_channels=(2, 2, 2, 2),
        decoder_block_out_channels=(2, 2, 2, 2),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
        timestep_conditioning=timestep_conditioning,
    )
    vae.latents_mean += torch.tensor([0.3, -0.2, 0.1, 0.4])
    vae.latents_std *= torch.tensor([1.3, 0.7, 2.1, 0.9])
    return ready(vae)


def cogvideox() -> Any:
    import diffusers

    return ready(
        diffusers.AutoencoderKLCogVideoX(
            latent_channels=CHANNELS, block_out_channels=(2, 2, 2, 2), layers_per_block=1, norm_num_groups=1
        )
    )


MAKERS: dict[str, Callable[[], Any]] = {
    "wan": wan,
    "wan_two_rates": wan_two_rates,
    "wan_residual": wan_residual,
    "hunyuan": hunyuan,
    "ltx": ltx,
    "ltx_timestep": lambda: ltx(timestep_conditioning=True),
    "cogvideox": cogvideox,
}


def ready(vae: Any) -> Any:
    """float64 throughout: Wan's upsampling, which copies pixels through float32, is put into the input's dtype."""
    for module in vae.modules():
        if type(module).__name__ == "WanUpsample":
            module.forward = types.MethodType(nn.Upsample.forward, module)
    for parameter in vae.parameters():
        # Parts that start at zero would hide what flows through them.
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return vae.double().eval()


def latents(name: str, batch: int, frames: int, height: int = 2, width: int = 3) -> Tensor:
    """In the layout of the family's pipeline, for LTX that of its VAE."""
    shape = (batch, CHANNELS, frames, height, width)
    values = torch.randn(shape, dtype=torch.float64)
    return values.transpose(1, 2).contiguous() if name == "cogvideox" else values


def plain(name: str, vae: Any, values: Tensor) -> Tensor:
    """The pipelines' decoding, written out: one graph for everything."""
    config = vae.config

    def channels(given: Any) -> Tensor:
        return torch.as_tensor(given).view(1, -1, 1, 1, 1).to(values.dtype)

    if name.startswith("wan"):
        values = values / (1.0 / channels(config.latents_std)) + channels(config.latents_mean)
    elif name == "hunyuan":
        values = values / config.scaling_factor
    elif name.startswith("ltx"):
        values = values * channels(vae.latents_std) / config.scaling_factor + channels(vae.latents_mean)
    else:
        values = 1 / config.scaling_factor * values.permute(0, 2, 1, 3, 4)
    level = [torch.zeros(len(values), dtype=values.dtype)] if name == "ltx_timestep" else []
    return (vae.decode(values, *level, return_dict=False)[0] * 0.5 + 0.5).clamp(0, 1)
