"""The demo's network: a small Wan transformer over codec latents, its noise and its one prompt."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

CHANNELS = 6
FRAMES, ROWS, COLUMNS = 8, 4, 4  # of a latent
TEXT_DIM = 16
TRAIN_TIMESTEPS = 1000

CONFIG: dict[str, Any] = {
    "patch_size": [1, 4, 4],  # one token a frame: the model has to learn motion, not texture
    "num_attention_heads": 6,
    "attention_head_dim": 32,
    "in_channels": CHANNELS,
    "out_channels": CHANNELS,
    "text_dim": TEXT_DIM,
    "freq_dim": 64,
    "ffn_dim": 256,
    "num_layers": 4,
    "rope_max_seq_len": 32,
}


def make_net(seed: int, **changes: Any) -> nn.Module:
    """A Wan transformer of the demo's size with random weights; ``changes`` replace entries of its config.

    Raises ImportError without diffusers.
    """
    try:
        from diffusers import WanTransformer3DModel
    except ImportError as error:
        raise ImportError("the demo needs diffusers: pip install 'prfl-fast[diffusers]'") from error
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net: nn.Module = WanTransformer3DModel(**{**CONFIG, **changes})
    return net


def prompt(batch: int) -> dict[str, Tensor]:
    """Conditioning of the one prompt that this model knows: text states ``[batch, 1, TEXT_DIM]`` of zeros."""
    return {"encoder_hidden_states": torch.zeros(batch, 1, TEXT_DIM)}


def draw_noise(count: int, seed: int, *, first: int = 0) -> Tensor:
    """Initial latents ``[count, C, F, H, W]`` numbered from ``first``; each depends on seed and number alone."""
    rows = []
    for index in range(first, first + count):
        generator = torch.Generator().manual_seed(1_000_003 * seed + index)
        rows.append(torch.randn(CHANNELS, FRAMES, ROWS, COLUMNS, generator=generator))
    return torch.stack(rows)


def add_noise(latents: Tensor, sigmas: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """``(1 - sigma) x + sigma eps`` for latents ``[B, ...]`` and noise levels ``[B]``, and its velocity ``eps - x``."""
    noise = torch.randn(latents.shape, generator=generator)
    level = sigmas.reshape(-1, *[1] * (latents.ndim - 1))
    return (1 - level) * latents + level * noise, noise - latents
