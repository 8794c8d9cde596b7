"""Peak memory and time of forward and backward through a video decoder: plain ``vae.decode`` against ``PixelDecoder``.

An AutoencoderKLWan with the published layout (four levels, two doublings of time, two residual blocks a level) and a
twelfth of its width, random weights, latents of 6 x 8. Bytes are those of all live tensors above the start, counted
storage by storage. No figure is written unless frames and gradient are those of the plain decoding.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import prfl_fast
from prfl_fast.benchmarks.registry import Row, Setting
from prfl_fast.memory.trace import LiveBytes

LATENT_FRAMES, TINY_LATENT_FRAMES = (1, 6, 11, 21), (2,)
REPEATS = 3
LARGEST_DIFFERENCE = 1e-6


def small_vae() -> Any:
    """The decoder, random weights."""
    import diffusers

    torch.manual_seed(0)
    return diffusers.AutoencoderKLWan(base_dim=8).eval().requires_grad_(False)


def plain(vae: Any) -> Callable[[Tensor], Tensor]:
    """``vae.decode`` as the pipeline calls it."""
    mean, std = (torch.tensor(v).view(1, -1, 1, 1, 1) for v in (vae.config.latents_mean, vae.config.latents_std))

    def decode(latents: Tensor) -> Tensor:
        frames: Tensor = vae.decode(latents / (1.0 / std) + mean, return_dict=False)[0]
        return (frames * 0.5 + 0.5).clamp(0, 1)

    return decode


def frames_and_gradient(decode: Callable[[Tensor], Tensor], latents: Tensor) -> tuple[Tensor, Tensor]:
    """Frames, and the gradient of their mean square."""
    leaf = latents.clone().requires_grad_()
    frames = decode(leaf)
    (gradient,) = torch.autograd.grad(frames.square().mean(), leaf)
    return frames.detach(), gradient


def details(setting: Setting) -> dict[str, Any]:
    """What stands above the rows."""
    return {"model": "AutoencoderKLWan, base_dim 8"}


def rows(setting: Setting) -> Iterator[Row]:
    """One row per way and number of latent frames."""
    vae = small_vae()
    ways: dict[str, Callable[[Tensor], Tensor]] = {
        "vae.decode": plain(vae),
        "PixelDecoder": prfl_fast.PixelDecoder(vae),
    }
    for count in TINY_LATENT_FRAMES if setting.tiny else LATENT_FRAMES:
        latents = torch.randn(1, vae.config.z_dim, count, 6, 8, generator=torch.Generator().manual_seed(count))
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(1 if setting.tiny else REPEATS):
            for name, decode in ways.items():
                start = time.process_time()
                frames_and_gradient(decode, latents)
                seconds[name].append(time.process_time() - start)
        first: tuple[Tensor, Tensor] | None = None
        for name, decode in ways.items():
            with LiveBytes() as live:
                frames, gradient = frames_and_gradient(decode, latents)
            first = first or (frames, gradient)
            difference = float((gradient - first[1]).norm() / first[1].norm())
            row: Row = {"way": name, "latent_frames": count, "frames": frames.shape[2]}
            if not torch.equal(frames, first[0]) or not difference <= LARGEST_DIFFERENCE:
                yield row | {"wrong": f"frames or gradient differ, the gradient by {difference:.1e}"}
                continue
            yield row | {
                "peak_bytes": live.peak,
                "processor_seconds": round(statistics.median(seconds[name]), 3),
                "relative_difference": difference,
            }
